//! One keep-alive HTTP/1.1 connection, with nothing between the caller and hyper: no pool and no
//! redirects, so that what is measured is the service. Like every client that keeps connections, it
//! opens one anew that the server closed while nobody used it (RFC 9112, section 9.5).

use std::time::Duration;

use anyhow::{Context, bail};
use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::client::conn::http1::{self, SendRequest};
use hyper::header::{CONTENT_TYPE, HOST, HeaderMap, HeaderName, HeaderValue};
use hyper::{Method, Request, StatusCode, Uri};
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;

/// RFC 7240; hyper has no constant for it.
pub const PREFER: HeaderName = HeaderName::from_static("prefer");

/// A service that accepts connections slower than this is not there for a person who waits.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// Where the service is: what a URL `http://host:port` names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Address {
    authority: String,
    /// What stands before `/orders` when the service sits behind a path of a gateway.
    prefix: String,
    host_header: HeaderValue,
}

/// A whole answer: these are small, so the body is read at once.
#[derive(Debug)]
pub struct Answer {
    pub status: StatusCode,
    pub headers: HeaderMap,
    pub body: Bytes,
}

pub struct Connection {
    sender: SendRequest<Full<Bytes>>,
    address: Address,
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
        let authority = format!("{host}:{port}");
        let host_header = HeaderValue::from_str(&authority).context("the host cannot stand in a header")?;
        Ok(Self { authority, prefix: uri.path().trim_end_matches('/').to_owned(), host_header })
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

impl Connection {
    pub async fn open(address: &Address) -> anyhow::Result<Self> {
        Ok(Self { sender: Self::connect(address).await?, address: address.clone() })
    }

    async fn connect(address: &Address) -> anyhow::Result<SendRequest<Full<Bytes>>> {
        let connecting = TcpStream::connect(&address.authority);
        let stream = tokio::time::timeout(CONNECT_TIMEOUT, connecting)
            .await
            .map_err(|_| anyhow::anyhow!("no connection within {} s", CONNECT_TIMEOUT.as_secs()))??;
        stream.set_nodelay(true).context("setting TCP_NODELAY")?;
        let (sender, connection) = http1::handshake(TokioIo::new(stream)).await.context("HTTP handshake")?;
        // Ends with the sender. Its error also reaches whoever waits for an answer.
        tokio::spawn(async move { drop(connection.await) });
        Ok(sender)
    }

    pub async fn get(&mut self, path: Uri) -> anyhow::Result<Answer> {
        self.send(Method::GET, path, None, Bytes::new()).await
    }

    pub async fn post_json(&mut self, path: Uri, prefer: HeaderValue, body: Bytes) -> anyhow::Result<Answer> {
        self.send(Method::POST, path, Some(prefer), body).await
    }

    async fn send(
        &mut self,
        method: Method,
        path: Uri,
        prefer: Option<HeaderValue>,
        body: Bytes,
    ) -> anyhow::Result<Answer> {
        let mut request = Request::new(Full::new(body));
        *request.method_mut() = method;
        *request.uri_mut() = path;
        let headers = request.headers_mut();
        headers.insert(HOST, self.address.host_header.clone());
        if let Some(prefer) = prefer {
            headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
            headers.insert(PREFER, prefer);
        }
        let mut is_new = false;
        let response = loop {
            if self.sender.ready().await.is_err() {
                self.sender = Self::connect(&self.address).await.context("connecting again")?;
                is_new = true;
            }
            match self.sender.try_send_request(request).await {
                Ok(response) => break response,
                // Closed at this very moment: nothing of it was sent, so it may be sent again.
                Err(mut error) => match error.take_message() {
                    Some(unsent) if !is_new => request = unsent,
                    _ => return Err(error.into_error().into()),
                },
            }
        };
        let (head, body) = response.into_parts();
        let body = body.collect().await?.to_bytes();
        Ok(Answer { status: head.status, headers: head.headers, body })
    }
}

#[cfg(test)]
mod tests {
    use test_support::stand_in::{respond, serve};

    use super::*;
    use hyper::header::CONNECTION;

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
            let answer = connection.get(address.path("/").expect("a path")).await.expect("an answer");
            assert_eq!(answer.status, StatusCode::OK);
        }
    }
}
