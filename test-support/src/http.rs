//! An HTTP client for tests: JSON in and out, kept connections, and raw bytes for what no proper
//! client would send.

use std::sync::Mutex;
use std::time::Duration;

use anyhow::{Context, anyhow};
use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::client::conn::http1::{self, SendRequest};
use hyper::header::{CONTENT_TYPE, HOST, HeaderMap, HeaderValue};
use hyper::{Method, Request, StatusCode};
use hyper_util::rt::TokioIo;
use serde_json::Value;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::Instant;

/// Longer than any wait that the service allows: what takes this long hangs.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(60);

type Sender = SendRequest<Full<Bytes>>;

/// An answer, and how long it took.
#[derive(Clone, Debug)]
pub struct Reply {
    pub status: u16,
    pub headers: HeaderMap,
    pub body: Bytes,
    pub took: Duration,
}

impl Reply {
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name).and_then(|value| value.to_str().ok())
    }

    /// Panics with the body when it is not JSON.
    #[track_caller]
    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|error| panic!("{error} in: {}", self.summary()))
    }

    /// A text field of the body. Panics with the body when it is absent.
    #[track_caller]
    pub fn text(&self, field: &str) -> String {
        match &self.json()[field] {
            Value::String(text) => text.clone(),
            other => panic!("{field} is {other} in: {}", self.summary()),
        }
    }

    #[track_caller]
    pub fn number(&self, field: &str) -> i64 {
        self.json()[field].as_i64().unwrap_or_else(|| panic!("no whole number {field} in: {}", self.summary()))
    }

    /// Panics with the whole answer when the status is another one.
    #[track_caller]
    pub fn expect_status(self, status: u16) -> Self {
        assert_eq!(self.status, status, "{}", self.summary());
        self
    }

    /// The problem's kind (`validation`, `conflict`, …); panics when the answer is no problem+json.
    #[track_caller]
    pub fn problem(&self) -> String {
        assert_eq!(self.header("content-type"), Some("application/problem+json"), "{}", self.summary());
        let kind = self.text("type");
        match kind.strip_prefix("urn:orderstream:problem:") {
            Some(kind) => kind.to_owned(),
            None => panic!("type {kind} in: {}", self.summary()),
        }
    }

    pub fn is_success(&self) -> bool {
        (200..300).contains(&self.status)
    }

    pub fn summary(&self) -> String {
        let body = String::from_utf8_lossy(&self.body);
        let body: String = body.chars().take(2_000).collect();
        format!("HTTP {} {:?} after {:?}: {body}", self.status, self.headers, self.took)
    }
}

/// Keeps its connections open between requests, as a busy client does. Cheap to share by `Arc`.
pub struct HttpClient {
    /// `host:port`
    address: String,
    idle: Mutex<Vec<Sender>>,
}

impl HttpClient {
    pub fn new(address: impl ToString) -> Self {
        Self { address: address.to_string(), idle: Mutex::default() }
    }

    /// From `http://host:port`.
    pub fn from_url(url: &str) -> Self {
        let address = url.trim().trim_start_matches("http://").trim_end_matches('/');
        Self::new(address)
    }

    pub fn address(&self) -> &str {
        &self.address
    }

    /// A create, an update or a delete that must be answered somehow.
    pub async fn post_order(&self, order: &Value) -> Reply {
        self.post_order_with(order, &[]).await
    }

    pub async fn post_order_with(&self, order: &Value, headers: &[(&str, &str)]) -> Reply {
        self.try_post_order(order, headers)
            .await
            .unwrap_or_else(|error| panic!("POST {}/orders: {error:#}", self.address))
    }

    /// `Prefer: respond-async`: answered at commit.
    pub async fn post_order_async(&self, order: &Value) -> Reply {
        self.post_order_with(order, &[("prefer", "respond-async")]).await
    }

    /// For tests that break the connection: an error is an outcome here.
    pub async fn try_post_order(&self, order: &Value, headers: &[(&str, &str)]) -> anyhow::Result<Reply> {
        let body = Bytes::from(order.to_string());
        let mut all = vec![("content-type", "application/json")];
        all.extend_from_slice(headers);
        self.send(Method::POST, "/orders", &all, body).await
    }

    pub async fn get(&self, path: &str) -> Reply {
        self.try_get(path).await.unwrap_or_else(|error| panic!("GET {}{path}: {error:#}", self.address))
    }

    pub async fn try_get(&self, path: &str) -> anyhow::Result<Reply> {
        self.send(Method::GET, path, &[], Bytes::new()).await
    }

    pub async fn get_order(&self, order_id: &str) -> Value {
        self.get(&format!("/orders/{order_id}")).await.expect_status(200).json()
    }

    pub async fn history(&self, order_id: &str) -> Vec<Value> {
        let reply = self.get(&format!("/orders/{order_id}/history")).await.expect_status(200);
        match reply.json() {
            Value::Array(rows) => rows,
            other => panic!("the history is no array: {other}"),
        }
    }

    /// The sum over all label sets of one metric; 0 when it was never touched.
    pub async fn metric(&self, name: &str) -> f64 {
        let reply = self.get("/metrics").await.expect_status(200);
        let text = String::from_utf8_lossy(&reply.body);
        text.lines()
            .filter(|line| line.strip_prefix(name).is_some_and(|rest| rest.starts_with([' ', '{'])))
            .filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok())
            .sum()
    }

    /// One request, on a kept connection where one is free. Never repeated: the caller decides
    /// what a lost answer means.
    pub async fn send(
        &self,
        method: Method,
        path: &str,
        headers: &[(&str, &str)],
        body: Bytes,
    ) -> anyhow::Result<Reply> {
        let mut request = Request::builder().method(method).uri(path).body(Full::new(body))?;
        let host = HeaderValue::from_str(&self.address)?;
        request.headers_mut().insert(HOST, host);
        for (name, value) in headers {
            // Appended: a test may send the same header twice.
            request.headers_mut().append(
                hyper::header::HeaderName::from_bytes(name.as_bytes())?,
                HeaderValue::from_bytes(value.as_bytes())?,
            );
        }
        let started = Instant::now();
        tokio::time::timeout(REQUEST_TIMEOUT, self.exchange(request, started))
            .await
            .map_err(|_| anyhow!("no answer within {REQUEST_TIMEOUT:?}"))?
    }

    async fn exchange(&self, request: Request<Full<Bytes>>, started: Instant) -> anyhow::Result<Reply> {
        let mut sender = self.connection().await?;
        let response = sender.send_request(request).await.context("sending")?;
        let (parts, body) = response.into_parts();
        let body = body.collect().await.context("reading the answer")?.to_bytes();
        if sender.ready().await.is_ok() {
            self.idle.lock().expect("never poisoned").push(sender);
        }
        Ok(Reply { status: parts.status.as_u16(), headers: parts.headers, body, took: started.elapsed() })
    }

    async fn connection(&self) -> anyhow::Result<Sender> {
        loop {
            let kept = self.idle.lock().expect("never poisoned").pop();
            match kept {
                Some(mut sender) => {
                    // Closed meanwhile by the server: not this request's failure.
                    if !sender.is_closed() && sender.ready().await.is_ok() {
                        return Ok(sender);
                    }
                }
                None => return self.connect().await,
            }
        }
    }

    async fn connect(&self) -> anyhow::Result<Sender> {
        let stream = TcpStream::connect(&self.address).await.context("connecting")?;
        stream.set_nodelay(true)?;
        let (sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
        tokio::spawn(connection);
        Ok(sender)
    }

    /// Writes `bytes` on a connection of its own, closes its half, and reads what comes back until
    /// the server closes. The answer is taken apart by hand; chunked bodies stay as they are.
    pub async fn send_raw(&self, bytes: &[u8]) -> anyhow::Result<Reply> {
        let started = Instant::now();
        let exchange = async {
            let stream = TcpStream::connect(&self.address).await.context("connecting")?;
            let (mut read, mut write) = stream.into_split();
            let writing = async {
                // A server that refuses early closes while we still write.
                let _ = write.write_all(bytes).await;
                let _ = write.shutdown().await;
            };
            let mut received = Vec::new();
            let (read, ()) = tokio::join!(read.read_to_end(&mut received), writing);
            if received.is_empty() {
                read.context("reading the answer")?;
            }
            parse_raw(&received, started)
        };
        tokio::time::timeout(REQUEST_TIMEOUT, exchange)
            .await
            .map_err(|_| anyhow!("no answer within {REQUEST_TIMEOUT:?}"))?
    }

    /// `POST /orders` with any bytes as its body.
    pub async fn post_bytes(&self, content_type: &str, body: impl Into<Bytes>) -> Reply {
        self.send(Method::POST, "/orders", &[(CONTENT_TYPE.as_str(), content_type)], body.into())
            .await
            .unwrap_or_else(|error| panic!("POST {}/orders: {error:#}", self.address))
    }
}

fn parse_raw(received: &[u8], started: Instant) -> anyhow::Result<Reply> {
    let head_end = received
        .windows(4)
        .position(|window| window == b"\r\n\r\n")
        .with_context(|| format!("no answer in {:?}", String::from_utf8_lossy(received)))?;
    let head = std::str::from_utf8(&received[..head_end])?;
    let mut lines = head.split("\r\n");
    let status: u16 = lines.next().and_then(|line| line.split(' ').nth(1)).context("no status line")?.parse()?;
    StatusCode::from_u16(status)?;
    let mut headers = HeaderMap::new();
    for line in lines {
        let (name, value) = line.split_once(':').context("a header without a colon")?;
        headers.append(hyper::header::HeaderName::from_bytes(name.as_bytes())?, HeaderValue::from_str(value.trim())?);
    }
    let body = Bytes::copy_from_slice(&received[head_end + 4..]);
    Ok(Reply { status, headers, body, took: started.elapsed() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_raw_answer_is_taken_apart() {
        let bytes = b"HTTP/1.1 400 Bad Request\r\ncontent-type: text/plain\r\n\r\nno";
        let reply = parse_raw(bytes, Instant::now()).expect("an answer");
        assert_eq!(reply.status, 400);
        assert_eq!(reply.header("content-type"), Some("text/plain"));
        assert_eq!(&reply.body[..], b"no");
    }
}
