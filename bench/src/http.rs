//! One keep-alive HTTP/1.1 connection, with nothing between the caller and the socket: what a client
//! costs comes out of the same processors as what is measured, and one of hyper, with a task and a
//! channel for each connection, costs twice as much. It reads what our own services answer: bodies
//! with a length. Like every client that keeps connections, it opens one anew that the server closed
//! while nobody used it (RFC 9112, section 9.5).

use std::io::{ErrorKind, Write as _};
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use hyper::header::{HeaderName, HeaderValue};
use hyper::{StatusCode, Uri};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

/// RFC 7240; hyper has no constant for it.
pub const PREFER: HeaderName = HeaderName::from_static("prefer");

/// Our services answer with a dozen.
const MAX_HEADERS: usize = 64;
/// For a request and its answer; those that are larger make more.
const ROOM: usize = 2048;

/// A service that accepts connections slower than this is not there for a person who waits.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// Where the service is: what a URL `http://host:port` names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Address {
    authority: String,
    /// What stands before `/orders` when the service sits behind a path of a gateway.
    prefix: String,
}

/// A whole answer: these are small, so the body is read at once.
#[derive(Debug)]
pub struct Answer<'a> {
    pub status: StatusCode,
    pub body: &'a [u8],
    head: &'a [u8],
}

pub struct Connection {
    stream: TcpStream,
    address: Address,
    /// The request, and then its answer.
    buffer: Vec<u8>,
    /// The server said that it closes after this answer.
    is_closing: bool,
}

/// What is known of an answer once its head is there.
struct Head {
    status: StatusCode,
    len: usize,
    body_len: usize,
    is_closing: bool,
}

impl Address {
    pub fn parse(url: &str) -> anyhow::Result<Self> {
        let uri: Uri = url.parse().with_context(|| format!("{url:?} is not a URL"))?;
        match uri.scheme_str() {
            Some("http") => {}
            Some(other) => bail!("{url:?}: only http:// is spoken here, not {other}://"),
            None => bail!("{url:?} is not a URL; write http://host:port"),
        }
        let host = uri.host().with_context(|| format!("{url:?} names no host"))?;
        let port = uri.port_u16().unwrap_or(80);
        Ok(Self { authority: format!("{host}:{port}"), prefix: uri.path().trim_end_matches('/').to_owned() })
    }

    pub fn authority(&self) -> &str {
        &self.authority
    }

    pub fn url(&self) -> String {
        format!("http://{}{}", self.authority, self.prefix)
    }

    /// A path of the service as this address reaches it.
    pub fn path(&self, path: &str) -> anyhow::Result<Uri> {
        let path = format!("{}{path}", self.prefix);
        path.parse().with_context(|| format!("{path:?} is not a path"))
    }
}

impl Answer<'_> {
    /// The first of these headers, if it is text.
    pub fn header(&self, name: &HeaderName) -> Option<&str> {
        let mut headers = [httparse::EMPTY_HEADER; MAX_HEADERS];
        httparse::Response::new(&mut headers).parse(self.head).ok()?;
        let header = headers.iter().find(|header| header.name.eq_ignore_ascii_case(name.as_str()))?;
        std::str::from_utf8(header.value).ok()
    }
}

impl Connection {
    pub async fn open(address: &Address) -> anyhow::Result<Self> {
        let (stream, address) = (connect(address).await?, address.clone());
        Ok(Self { stream, address, buffer: Vec::with_capacity(ROOM), is_closing: false })
    }

    pub async fn get(&mut self, path: &Uri) -> anyhow::Result<Answer<'_>> {
        self.buffer.clear();
        write!(self.buffer, "GET {path} HTTP/1.1\r\nhost: {}\r\n\r\n", self.address.authority)?;
        self.send().await
    }

    pub async fn post_json(&mut self, path: &Uri, prefer: &HeaderValue, body: &[u8]) -> anyhow::Result<Answer<'_>> {
        let (host, prefer, len) = (&self.address.authority, prefer.to_str()?, body.len());
        self.buffer.clear();
        write!(
            self.buffer,
            "POST {path} HTTP/1.1\r\nhost: {host}\r\ncontent-type: application/json\r\nprefer: {prefer}\r\n\
             content-length: {len}\r\n\r\n"
        )?;
        self.buffer.extend_from_slice(body);
        self.send().await
    }

    async fn send(&mut self) -> anyhow::Result<Answer<'_>> {
        if self.is_closing || is_closed(&self.stream) {
            self.stream = connect(&self.address).await.context("connecting again")?;
        }
        self.stream.write_all(&self.buffer).await?;
        self.buffer.clear();
        let head = loop {
            ensure!(self.stream.read_buf(&mut self.buffer).await? > 0, "the server closed the connection");
            if let Some(head) = Head::parse(&self.buffer)? {
                break head;
            }
        };
        let whole = head.len + head.body_len;
        self.buffer.reserve(whole.saturating_sub(self.buffer.len()));
        while self.buffer.len() < whole {
            ensure!(self.stream.read_buf(&mut self.buffer).await? > 0, "the server closed in the middle of an answer");
        }
        self.is_closing = head.is_closing;
        let (head_bytes, body) = self.buffer.split_at(head.len);
        Ok(Answer { status: head.status, head: head_bytes, body: &body[..head.body_len] })
    }
}

impl Head {
    /// `None` as long as it is not whole.
    fn parse(bytes: &[u8]) -> anyhow::Result<Option<Self>> {
        let mut headers = [httparse::EMPTY_HEADER; MAX_HEADERS];
        let mut response = httparse::Response::new(&mut headers);
        let httparse::Status::Complete(len) = response.parse(bytes).context("reading an answer")? else {
            return Ok(None);
        };
        let status = StatusCode::from_u16(response.code.unwrap_or_default())?;
        let (mut body_len, mut is_closing) = (None, false);
        for header in response.headers {
            if header.name.eq_ignore_ascii_case("content-length") {
                body_len = std::str::from_utf8(header.value).ok().and_then(|value| value.parse().ok());
            } else if header.name.eq_ignore_ascii_case("connection") {
                is_closing = header.value.eq_ignore_ascii_case(b"close");
            }
        }
        let body_len = body_len.with_context(|| format!("{status} without a content-length"))?;
        Ok(Some(Self { status, len, body_len, is_closing }))
    }
}

async fn connect(address: &Address) -> anyhow::Result<TcpStream> {
    let stream = tokio::time::timeout(CONNECT_TIMEOUT, TcpStream::connect(&address.authority))
        .await
        .map_err(|_| anyhow::anyhow!("no connection within {} s", CONNECT_TIMEOUT.as_secs()))??;
    stream.set_nodelay(true).context("setting TCP_NODELAY")?;
    Ok(stream)
}

/// Did the server end this connection, or say what nobody asked for?
fn is_closed(stream: &TcpStream) -> bool {
    !matches!(stream.try_read(&mut [0]), Err(error) if error.kind() == ErrorKind::WouldBlock)
}

#[cfg(test)]
mod tests {
    use test_support::stand_in::{respond, serve};

    use super::*;
    use hyper::header::{CONNECTION, RETRY_AFTER};

    #[test]
    fn an_address_keeps_the_path_of_a_gateway() {
        let address = Address::parse("http://localhost:8080/shop/").expect("an address");
        assert_eq!(address.path("/orders").expect("a path").path(), "/shop/orders");
        assert_eq!(address.authority, "localhost:8080");
    }

    #[test]
    fn what_is_not_an_http_url_is_refused_in_plain_words() {
        for (url, says) in [("localhost:8080", "http://host:port"), ("https://a", "https://"), ("", "not a URL")] {
            let error = Address::parse(url).expect_err(url);
            assert!(format!("{error:#}").contains(says), "{url:?} gave {error:#}");
        }
    }

    #[test]
    fn an_answer_is_read_when_its_head_is_whole_and_needs_a_length() {
        let text = b"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 1\r\nContent-Length: 2\r\n\r\n{}";
        let whole = text.len() - 2;
        for cut in 0..whole {
            assert!(Head::parse(&text[..cut]).expect("no error").is_none(), "after {cut} bytes");
        }
        let head = Head::parse(text).expect("no error").expect("a head");
        assert_eq!(
            (head.status, head.len, head.body_len, head.is_closing),
            (StatusCode::SERVICE_UNAVAILABLE, whole, 2, false)
        );
        let answer = Answer { status: head.status, body: b"{}", head: &text[..whole] };
        assert_eq!((answer.header(&RETRY_AFTER), answer.header(&CONNECTION)), (Some("1"), None));
        assert!(Head::parse(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n").is_err());
        assert!(Head::parse(b"no HTTP at all\r\n\r\n").is_err());
    }

    #[tokio::test]
    async fn a_connection_that_was_closed_while_idle_is_opened_again() {
        let url = serve(|_| {
            let mut answer = respond(200, "{}");
            answer.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
            answer
        });
        let address = Address::parse(&url.await).expect("an address");
        let mut connection = Connection::open(&address).await.expect("a connection");
        for _ in 0..20 {
            let answer = connection.get(&address.path("/").expect("a path")).await.expect("an answer");
            assert_eq!(answer.status, StatusCode::OK);
        }
    }
}
