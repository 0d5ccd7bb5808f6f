//! A client of server-sent events, as a browser's is but for coming back by itself.

use std::collections::VecDeque;
use std::time::Duration;

use anyhow::{Context, bail};
use bytes::Bytes;
use http_body_util::{BodyExt, Empty};
use hyper::body::Incoming;
use hyper::client::conn::http1;
use hyper::header::HOST;
use hyper::{HeaderMap, Request};
use hyper_util::rt::TokioIo;
use serde_json::Value;
use tokio::net::TcpStream;

/// A server that does not even answer is not there.
const OPEN_TIMEOUT: Duration = Duration::from_secs(20);

#[derive(Clone, Debug, Default, PartialEq)]
pub struct Event {
    pub id: String,
    pub kind: String,
    pub data: Value,
}

/// A stream that is open. Closed when dropped.
#[derive(Debug)]
pub struct EventStream {
    body: Incoming,
    /// What came and is no whole line yet.
    rest: Vec<u8>,
    event: Event,
    whole: VecDeque<Event>,
}

impl EventStream {
    /// Its status and headers, and the stream where the status is 200.
    pub async fn open(
        address: &str,
        path: &str,
        headers: &[(&str, &str)],
    ) -> anyhow::Result<(u16, HeaderMap, Option<Self>)> {
        let mut request = Request::get(path).header(HOST, address).header("accept", "text/event-stream");
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let request = request.body(Empty::<Bytes>::new())?;
        let opening = async {
            let stream = TcpStream::connect(address).await.context("connecting")?;
            let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
            tokio::spawn(connection);
            anyhow::Ok(sender.send_request(request).await.context("sending")?)
        };
        let response = tokio::time::timeout(OPEN_TIMEOUT, opening).await.context("no answer in time")??;
        let (parts, body) = response.into_parts();
        let stream = (parts.status == 200).then(|| Self {
            body,
            rest: Vec::new(),
            event: Event::default(),
            whole: VecDeque::new(),
        });
        Ok((parts.status.as_u16(), parts.headers, stream))
    }

    /// The next event; `None` when the server has ended the stream.
    ///
    /// # Errors
    /// When the connection broke, or what came is no event.
    pub async fn next(&mut self) -> anyhow::Result<Option<Event>> {
        loop {
            if let Some(event) = self.whole.pop_front() {
                return Ok(Some(event));
            }
            let Some(frame) = self.body.frame().await else { return Ok(None) };
            if let Ok(data) = frame.context("reading events")?.into_data() {
                self.rest.extend_from_slice(&data);
                self.take_lines()?;
            }
        }
    }

    /// All until the server ends the stream.
    ///
    /// # Errors
    /// As [`Self::next`].
    pub async fn rest(mut self) -> anyhow::Result<Vec<Event>> {
        let mut events = Vec::new();
        while let Some(event) = self.next().await? {
            events.push(event);
        }
        Ok(events)
    }

    fn take_lines(&mut self) -> anyhow::Result<()> {
        while let Some(end) = self.rest.iter().position(|byte| *byte == b'\n') {
            let line: Vec<u8> = self.rest.drain(..=end).collect();
            let line = std::str::from_utf8(&line)?.trim_end_matches('\n');
            match line.split_once(": ") {
                Some(("id", id)) => self.event.id = id.to_owned(),
                Some(("event", kind)) => self.event.kind = kind.to_owned(),
                Some(("data", data)) => self.event.data = serde_json::from_str(data).context("the data")?,
                Some(("retry", _)) => {}
                None if line.is_empty() => {
                    let event = std::mem::take(&mut self.event);
                    if event != Event::default() {
                        self.whole.push_back(event);
                    }
                }
                None if line.starts_with(':') => {}
                _ => bail!("{line:?} is no line of an event"),
            }
        }
        Ok(())
    }
}
