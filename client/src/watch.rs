//! What happens to an order from now on: server-sent events (WHATWG HTML, section 9.2), taken up
//! again where they broke off, from whichever replica answers then.

use std::time::Duration;

use anyhow::{Context as _, anyhow, bail};
use bytes::Bytes;
use http_body_util::{BodyExt as _, Either, Empty};
use hyper::{
    HeaderMap, Method, StatusCode,
    body::Incoming,
    header::{CONTENT_TYPE, HeaderValue},
};
use tokio::time::{Instant, sleep, timeout};

use crate::{
    http::{Service, encoded, refusal_of},
    output::note,
};

/// The service gives a sign of life every 15 s: a connection that is silent for longer is dead.
const SILENCE: Duration = Duration::from_secs(45);
const PAUSE: Duration = Duration::from_secs(1);
/// A service that is away for longer will not be waited for.
const PATIENCE: Duration = Duration::from_secs(120);
/// No event is larger.
const LONGEST: usize = 4 * 1024 * 1024;

/// Tells each event's data, until the order is where nothing moves it any more.
///
/// # Errors
/// When there is no such order, or nobody answers for a long time.
pub async fn watch(
    service: &Service,
    order_id: &str,
    since: Option<i64>,
    mut tell: impl FnMut(&str) -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    let path = format!("/orders/{}/watch", encoded(order_id));
    let mut last = since.map(|version| version.to_string());
    let mut heard = Instant::now();
    loop {
        let mut told = false;
        let broken = match open(service, &path, last.as_deref()).await {
            Ok(None) => return Ok(()),
            Ok(Some(mut body)) => {
                heard = Instant::now();
                let mut events = Events::default();
                loop {
                    match timeout(SILENCE, body.frame()).await {
                        Ok(Some(Ok(frame))) => {
                            for event in events.take(frame.data_ref().map_or(&[], |data| data))? {
                                tell(&event.data)?;
                                told = true;
                                last = event.id.or(last);
                                heard = Instant::now();
                            }
                        }
                        // A stream that ends may be at the end of all, which coming back tells.
                        Ok(None) => break None,
                        Ok(Some(Err(error))) => break Some(anyhow::Error::new(error)),
                        Err(_) => break Some(anyhow!("it fell silent")),
                    }
                }
            }
            Err(Refused::Final(error)) => return Err(error),
            Err(Refused::Now(error)) => Some(error),
        };
        if let Some(error) = broken {
            if heard.elapsed() > PATIENCE {
                return Err(error).context("the service stays away");
            }
            note(&format!("{error:#}; trying again"));
        } else if told {
            continue;
        }
        sleep(PAUSE).await;
    }
}

enum Refused {
    /// Another attempt may succeed.
    Now(anyhow::Error),
    Final(anyhow::Error),
}

/// `None`: there is nothing more to come.
async fn open(service: &Service, path: &str, last: Option<&str>) -> Result<Option<Incoming>, Refused> {
    let mut headers = HeaderMap::new();
    headers.insert("accept", HeaderValue::from_static("text/event-stream"));
    if let Some(value) = last.and_then(|last| HeaderValue::from_str(last).ok()) {
        headers.insert("last-event-id", value);
    }
    let body = Either::Left(Either::Left(Empty::new()));
    let response = service.open(Method::GET, path, headers, body).await.map_err(Refused::Now)?;
    match response.status() {
        StatusCode::OK if is_stream(response.headers()) => Ok(Some(response.into_body())),
        StatusCode::OK => Err(Refused::Final(anyhow!("{} does not answer with events", service.url()))),
        StatusCode::NO_CONTENT => Ok(None),
        status => {
            let error = anyhow!("{}", refusal_of(response).await);
            let may_pass = status.is_server_error() || status == StatusCode::TOO_MANY_REQUESTS;
            Err(if may_pass { Refused::Now(error) } else { Refused::Final(error) })
        }
    }
}

fn is_stream(headers: &HeaderMap) -> bool {
    let kind = headers.get(CONTENT_TYPE).and_then(|kind| kind.to_str().ok());
    kind.is_some_and(|kind| kind.starts_with("text/event-stream"))
}

#[derive(Debug, PartialEq)]
struct Event {
    id: Option<String>,
    data: String,
}

/// What has come of the stream and is no whole event yet.
#[derive(Default)]
struct Events {
    rest: Vec<u8>,
    id: Option<String>,
    data: Vec<String>,
}

impl Events {
    /// The events that are whole with these bytes.
    fn take(&mut self, bytes: &[u8]) -> anyhow::Result<Vec<Event>> {
        self.rest.extend_from_slice(bytes);
        if self.rest.len() > LONGEST {
            bail!("an event has more than {LONGEST} bytes: is that the order service?");
        }
        let mut events = Vec::new();
        while let Some(end) = self.rest.iter().position(|byte| *byte == b'\n') {
            let line = Bytes::from(self.rest.drain(..=end).collect::<Vec<u8>>());
            let line = String::from_utf8_lossy(&line);
            events.extend(self.line(line.trim_end_matches(['\n', '\r'])));
        }
        Ok(events)
    }

    fn line(&mut self, line: &str) -> Option<Event> {
        if line.is_empty() {
            let (id, data) = (self.id.take(), std::mem::take(&mut self.data));
            return (!data.is_empty()).then(|| Event { id, data: data.join("\n") });
        }
        let (field, value) = line.split_once(':').unwrap_or((line, ""));
        let value = value.strip_prefix(' ').unwrap_or(value);
        match field {
            "id" => self.id = Some(value.to_owned()),
            "data" => self.data.push(value.to_owned()),
            // What kind it is stands in the data, too; a line that begins with a colon is a comment.
            _ => {}
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_are_whole_however_the_bytes_come() {
        let stream =
            b"retry: 1000\n\n:\n\nid: 1\nevent: order.created\ndata: {\"a\":1}\n\nid: 2\r\ndata: x\r\ndata: y\r\n\r\n";
        let expected = [
            Event { id: Some("1".to_owned()), data: "{\"a\":1}".to_owned() },
            Event { id: Some("2".to_owned()), data: "x\ny".to_owned() },
        ];
        for size in 1..stream.len() {
            let mut events = Events::default();
            let parts = stream.chunks(size).flat_map(|part| events.take(part).expect("events"));
            assert_eq!(parts.collect::<Vec<_>>(), expected, "in parts of {size}");
        }
    }
}
