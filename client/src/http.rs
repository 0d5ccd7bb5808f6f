//! The service as its clients reach it: requests with who asks in their headers, and answers, or
//! what the service says of a refusal.

use std::time::Duration;

use anyhow::{Context as _, anyhow, bail};
use bytes::Bytes;
use http_body_util::{BodyExt as _, Either, Empty, Full, Limited, channel::Channel};
use hyper::{
    HeaderMap, Method, Request, Response, StatusCode, Uri,
    body::Incoming,
    header::{ACCEPT, AUTHORIZATION, CONTENT_TYPE, HeaderName, HeaderValue, USER_AGENT},
};
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder};
use hyper_util::{
    client::legacy::{Client, connect::HttpConnector},
    rt::TokioExecutor,
};
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};
use serde::Deserialize;

use crate::show::printable;

/// A service that accepts connections slower than this is not there for a person who waits.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// An answer that takes longer than this beyond what was waited for will not come.
const PATIENCE: Duration = Duration::from_secs(30);
/// More than the service ever answers at once.
const LARGEST_ANSWER: usize = 64 * 1024 * 1024;
/// A peer that has gone without a word is noticed within about this.
const KEEPALIVE: Duration = Duration::from_secs(30);
/// What may stand in a path or a query as it is (RFC 3986, section 2.3).
const UNRESERVED: AsciiSet = NON_ALPHANUMERIC.remove(b'-').remove(b'.').remove(b'_').remove(b'~');

/// None, a whole one, or one that is written while the answer is read.
pub type Body = Either<Either<Empty<Bytes>, Full<Bytes>>, Channel<Bytes, anyhow::Error>>;

/// RFC 7240; hyper has no constant for it.
pub const PREFER: HeaderName = HeaderName::from_static("prefer");

/// Where the service is, and who asks there.
#[derive(Clone)]
pub struct Service {
    /// Without a slash at its end.
    url: String,
    who: HeaderMap,
    http: Client<HttpsConnector<HttpConnector>, Body>,
}

/// Who asks, as far as that is said.
#[derive(Clone, Debug, Default)]
pub struct Identity {
    /// `X-User-Id`.
    pub user: Option<String>,
    /// `X-User-Role`.
    pub role: Option<String>,
    /// `Authorization: Bearer`.
    pub token: Option<String>,
}

/// A whole answer.
#[derive(Debug)]
pub struct Answer {
    pub status: StatusCode,
    pub headers: HeaderMap,
    pub body: Bytes,
}

impl Service {
    /// # Errors
    /// When the URL is none, or there is nothing to check `https` with.
    pub fn new(url: &str, identity: &Identity) -> anyhow::Result<Self> {
        // Without the URL, which is told wherever it is of use.
        if url.contains('@') {
            bail!("the service's URL (--url, ORDERSTREAM_URL) has a user or a password in it; --token says who asks");
        }
        let uri: Uri = url.parse().with_context(|| format!("{url:?} is not a URL"))?;
        if !matches!(uri.scheme_str(), Some("http" | "https")) || uri.host().is_none_or(str::is_empty) {
            bail!("{url:?} is not the URL of a service; write http://host:port or https://host");
        }
        if uri.query().is_some() {
            bail!("{url:?} has a query; write http://host:port, perhaps with a path");
        }
        let mut who = HeaderMap::new();
        who.insert(USER_AGENT, HeaderValue::from_static(concat!("orderstream/", env!("CARGO_PKG_VERSION"))));
        if let Some(user) = &identity.user {
            who.insert("x-user-id", HeaderValue::from_str(user).context("the user's id cannot stand in a header")?);
        }
        if let Some(role) = &identity.role {
            who.insert("x-user-role", HeaderValue::from_str(role).context("the role cannot stand in a header")?);
        }
        if let Some(token) = &identity.token {
            let mut value = HeaderValue::from_str(&format!("Bearer {token}"))
                .map_err(|_| anyhow!("the token cannot stand in a header"))?;
            value.set_sensitive(true);
            who.insert(AUTHORIZATION, value);
        }
        let http = Client::builder(TokioExecutor::new()).build(connector(uri.scheme_str() == Some("https"))?);
        Ok(Self { url: url.trim_end_matches('/').to_owned(), who, http })
    }

    #[must_use]
    pub fn url(&self) -> &str {
        &self.url
    }

    /// What of the URL stands before the service's own paths.
    #[must_use]
    pub fn path(&self) -> &str {
        let authority = self.url.split_once("://").map_or(&*self.url, |(_, rest)| rest);
        authority.find('/').map_or("", |start| &authority[start..])
    }

    /// Asks for `path`, which may have a query; the answer's body is still to be read.
    ///
    /// # Errors
    /// When nobody answers.
    pub async fn open(
        &self,
        method: Method,
        path: &str,
        headers: HeaderMap,
        body: Body,
    ) -> anyhow::Result<Response<Incoming>> {
        let mut request = Request::builder().method(method).uri(format!("{}{path}", self.url)).body(body)?;
        request.headers_mut().extend(self.who.clone());
        request.headers_mut().extend(headers);
        let sent = self.http.request(request).await;
        sent.map_err(|error| {
            let what = if error.is_connect() {
                format!("nobody answers at {}; is the service running there (--url, ORDERSTREAM_URL)?", self.url)
            } else {
                format!("{} broke the connection off", self.url)
            };
            anyhow::Error::new(error).context(what)
        })
    }

    /// The whole answer, within `wait` and a while.
    ///
    /// # Errors
    /// When none comes.
    pub async fn ask(
        &self,
        method: Method,
        path: &str,
        headers: HeaderMap,
        body: Option<Bytes>,
        wait: Duration,
    ) -> anyhow::Result<Answer> {
        let body = match body {
            Some(bytes) => Either::Left(Either::Right(Full::new(bytes))),
            None => Either::Left(Either::Left(Empty::new())),
        };
        let asking = async {
            let (head, body) = self.open(method, path, headers, body).await?.into_parts();
            let body = Limited::new(body, LARGEST_ANSWER).collect().await;
            let body = body.map_err(|error| anyhow!("{error}")).context("the answer broke off")?.to_bytes();
            Ok(Answer { status: head.status, headers: head.headers, body })
        };
        let limit = wait + PATIENCE;
        let late = || anyhow!("{} did not answer within {} s", self.url, limit.as_secs());
        tokio::time::timeout(limit, asking).await.map_err(|_| late())?
    }

    /// What stands at `path`.
    ///
    /// # Errors
    /// When none comes, or it is a refusal.
    pub async fn get(&self, path: &str) -> anyhow::Result<Answer> {
        let headers = HeaderMap::from_iter([(ACCEPT, HeaderValue::from_static("application/json"))]);
        self.ask(Method::GET, path, headers, None, Duration::ZERO).await?.accepted()
    }
}

/// The header that says that a body is JSON.
#[must_use]
pub fn json() -> (HeaderName, HeaderValue) {
    (CONTENT_TYPE, HeaderValue::from_static("application/json"))
}

/// One segment of a path, or one value of a query.
#[must_use]
pub fn encoded(text: &str) -> String {
    utf8_percent_encode(text, &UNRESERVED).to_string()
}

fn connector(needs_roots: bool) -> anyhow::Result<HttpsConnector<HttpConnector>> {
    let provider = rustls::crypto::ring::default_provider();
    let builder = match HttpsConnectorBuilder::new().with_provider_and_native_roots(provider.clone()) {
        Ok(builder) => builder,
        Err(error) if needs_roots => return Err(error).context("no root certificates to check the service's with"),
        Err(_) => {
            let config = rustls::ClientConfig::builder_with_provider(provider.into())
                .with_safe_default_protocol_versions()
                .context("setting up TLS")?;
            let none = rustls::RootCertStore::empty();
            HttpsConnectorBuilder::new().with_tls_config(config.with_root_certificates(none).with_no_client_auth())
        }
    };
    let mut connector = HttpConnector::new();
    connector.enforce_http(false);
    connector.set_nodelay(true);
    connector.set_connect_timeout(Some(CONNECT_TIMEOUT));
    connector.set_keepalive(Some(KEEPALIVE));
    Ok(builder.https_or_http().enable_http1().wrap_connector(connector))
}

/// A refusal as the service tells it (RFC 9457).
#[derive(Debug, Deserialize)]
struct Problem {
    title: Option<String>,
    detail: Option<String>,
    #[serde(default)]
    errors: Vec<Violation>,
}

#[derive(Debug, Deserialize)]
struct Violation {
    pointer: String,
    reason: String,
}

impl Answer {
    /// # Errors
    /// When it is a refusal: what the service says of it.
    pub fn accepted(self) -> anyhow::Result<Self> {
        if self.status.is_success() { Ok(self) } else { Err(anyhow!("{}", self.refusal())) }
    }

    /// A refusal in the service's words, where it has any.
    #[must_use]
    pub fn refusal(&self) -> String {
        refusal(self.status, &self.body)
    }

    #[must_use]
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name)?.to_str().ok()
    }
}

/// The same of an answer whose body is still to be read.
pub async fn refusal_of(response: Response<Incoming>) -> String {
    let (head, body) = response.into_parts();
    let body = Limited::new(body, LARGEST_ANSWER).collect().await.map(|body| body.to_bytes()).unwrap_or_default();
    refusal(head.status, &body)
}

/// What a refusal says: status, title, and each broken rule or the detail.
#[must_use]
pub fn refusal(status: StatusCode, body: &[u8]) -> String {
    const SHOWN: usize = 300;
    let Ok(problem) = serde_json::from_slice::<Problem>(body) else {
        let text: String = String::from_utf8_lossy(body).trim().chars().take(SHOWN).collect();
        return if text.is_empty() { status.to_string() } else { format!("{status}: {}", printable(&text)) };
    };
    let title = problem.title.unwrap_or_else(|| status.canonical_reason().unwrap_or_default().to_owned());
    let mut text = format!("{}: {}", status.as_u16(), printable(&title));
    if let Some(detail) = problem.detail.filter(|_| problem.errors.is_empty()) {
        text.push_str(&format!(": {}", printable(&detail)));
    }
    if status == StatusCode::UNAUTHORIZED {
        text.push_str(" (--as, --role or --token say who asks)");
    }
    for violation in problem.errors {
        let pointer = if violation.pointer.is_empty() { "the body" } else { &violation.pointer };
        text.push_str(&format!("\n  {} {}", printable(pointer), printable(&violation.reason)));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_url_of_a_service_is_refused_in_plain_words() {
        for (url, says) in [
            ("localhost:8080", "http://host:port"),
            ("ftp://a", "http://host:port"),
            ("", "not a URL"),
            ("http://a/?b=c", "has a query"),
            ("http://u:p@a", "--token"),
        ] {
            let error = Service::new(url, &Identity::default()).err().expect(url);
            assert!(format!("{error:#}").contains(says), "{url:?} gave {error:#}");
        }
        let service = |url| Service::new(url, &Identity::default()).expect("a URL");
        assert_eq!((service("http://a/shop/").url(), service("http://a/shop/").path()), ("http://a/shop", "/shop"));
        assert_eq!(service("http://a:1").path(), "");
    }

    #[test]
    fn who_asks_is_said_in_headers_and_the_token_is_kept_from_logs() {
        let given = |text: &str| Some(text.to_owned());
        let identity = Identity { user: given("demo"), role: given("service"), token: given("t") };
        let who = Service::new("http://a", &identity).expect("a service").who;
        for (name, value) in [("x-user-id", "demo"), ("x-user-role", "service"), ("authorization", "Bearer t")] {
            assert_eq!(who[name], value);
        }
        assert!(who[AUTHORIZATION].is_sensitive());
        let error = Service::new("http://a", &Identity { role: given("a\nb"), ..Identity::default() }).err();
        assert!(error.expect("a refusal").to_string().contains("role cannot stand in a header"));
    }

    #[test]
    fn a_refusal_names_each_broken_rule() {
        let body = br#"{"title":"The request breaks rules","detail":"all in one","errors":[{"pointer":"/user_id","reason":"is missing"},{"pointer":"","reason":"is odd"}]}"#;
        let text = refusal(StatusCode::UNPROCESSABLE_ENTITY, body);
        assert_eq!(text, "422: The request breaks rules\n  /user_id is missing\n  the body is odd");
        let body = br#"{"title":"Not now; try again","detail":"the database is away"}"#;
        assert_eq!(refusal(StatusCode::SERVICE_UNAVAILABLE, body), "503: Not now; try again: the database is away");
        assert_eq!(refusal(StatusCode::BAD_GATEWAY, b"<html>"), "502 Bad Gateway: <html>");
        assert_eq!(refusal(StatusCode::NOT_FOUND, b""), "404 Not Found");
        // Nothing in it speaks to the terminal.
        let hostile = r#"{"title":"\u001b[31mT","errors":[{"pointer":"/\u009bX","reason":"\u0007"}]}"#;
        for body in [hostile.as_bytes(), b"\x1b[31m".as_slice()] {
            let text = refusal(StatusCode::BAD_REQUEST, body);
            assert!(text.lines().all(|line| !line.contains(char::is_control)), "{text:?}");
        }
    }
}
