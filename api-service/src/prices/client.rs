//! Asks the product service for one price, once. Whatever answers there, it takes neither much
//! memory nor long.

use std::time::Duration;

use anyhow::{Context as _, bail};
use axum::http::{Method, Request, StatusCode, Uri, header};
use bytes::Bytes;
use http_body_util::{BodyExt as _, Empty, Limited};
use hyper_rustls::{ConfigBuilderExt as _, HttpsConnector, HttpsConnectorBuilder};
use hyper_util::{
    client::legacy::{Client as HttpClient, connect::HttpConnector},
    rt::{TokioExecutor, TokioTimer},
};
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};
use serde::Deserialize;
use serde_json::value::RawValue;
use shared::{message::unmarked, money::Money, order};

/// Larger than any product; a catalogue is none.
const MAX_ANSWER: usize = 64 * 1024;
/// Kept open for the next order.
const IDLE_CONNECTIONS: usize = 32;
const IDLE_TIMEOUT: Duration = Duration::from_secs(30);

/// What may stand in a path as it is (RFC 3986, section 2.3).
const UNRESERVED: AsciiSet = NON_ALPHANUMERIC.remove(b'-').remove(b'.').remove(b'_').remove(b'~');

pub(crate) struct Client {
    base: String,
    http: HttpClient<HttpsConnector<HttpConnector>, Empty<Bytes>>,
}

/// What the product service says, when it does.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Answer {
    Price(Money),
    /// It knows no such product.
    Unknown,
    /// It knows the product, and no price that could be used.
    NoPrice(String),
    /// That is no product service, or not one for us.
    Strange(String),
}

impl Client {
    /// # Errors
    /// Saying what is wrong with the address.
    pub(crate) fn new(url: &str) -> anyhow::Result<Self> {
        let base = base(url)?;
        let tls = rustls::ClientConfig::builder_with_provider(rustls::crypto::ring::default_provider().into())
            .with_safe_default_protocol_versions()
            .context("setting up TLS")?;
        let tls = match tls.clone().with_native_roots() {
            Ok(tls) => tls.with_no_client_auth(),
            Err(error) if base.starts_with("https:") => {
                return Err(error).context("no root certificates to check the product service's with");
            }
            Err(_) => tls.with_root_certificates(rustls::RootCertStore::empty()).with_no_client_auth(),
        };
        let mut connector = HttpConnector::new();
        connector.enforce_http(false);
        connector.set_nodelay(true);
        let connector =
            HttpsConnectorBuilder::new().with_tls_config(tls).https_or_http().enable_http1().wrap_connector(connector);
        let http = HttpClient::builder(TokioExecutor::new())
            .pool_timer(TokioTimer::new())
            .pool_idle_timeout(IDLE_TIMEOUT)
            .pool_max_idle_per_host(IDLE_CONNECTIONS)
            .build(connector);
        Ok(Self { base, http })
    }

    /// # Errors
    /// When nothing came, or that it is out of order: such as may be tried again.
    pub(crate) async fn price(&self, product_id: &str) -> anyhow::Result<Answer> {
        // A path with these in it is another path, however they are written.
        if matches!(product_id, "." | "..") {
            return Ok(Answer::Unknown);
        }
        let uri = format!("{}/api/products/{}", self.base, utf8_percent_encode(product_id, &UNRESERVED));
        let request = Request::builder()
            .method(Method::GET)
            .uri(uri)
            .header(header::ACCEPT, "application/json")
            .header(header::USER_AGENT, concat!("orderstream/", env!("CARGO_PKG_VERSION")))
            .body(Empty::new())?;
        let response = self.http.request(request).await?;
        let status = response.status();
        if status.is_server_error() || status == StatusCode::TOO_MANY_REQUESTS {
            bail!("the product service answered {status}");
        }
        match status {
            StatusCode::OK => {}
            // Services whose ids are of one form say of others that they are malformed.
            StatusCode::NOT_FOUND | StatusCode::GONE | StatusCode::BAD_REQUEST | StatusCode::UNPROCESSABLE_ENTITY => {
                return Ok(Answer::Unknown);
            }
            _ => return Ok(Answer::Strange(format!("it answered {status}"))),
        }
        match Limited::new(response.into_body(), MAX_ANSWER).collect().await {
            Ok(body) => Ok(read(&body.to_bytes())),
            Err(error) if error.is::<http_body_util::LengthLimitError>() => {
                Ok(Answer::Strange(format!("its answer has more than {MAX_ANSWER} bytes")))
            }
            Err(error) => bail!("its answer broke off: {error}"),
        }
    }
}

/// `http://host:port`, perhaps with a path before `/api/products`.
fn base(url: &str) -> anyhow::Result<String> {
    let uri: Uri = url.parse().context("is no URL")?;
    if !matches!(uri.scheme_str(), Some("http" | "https")) || uri.host().is_none_or(str::is_empty) {
        bail!("must be http://host:port or https://host");
    }
    // With an @ behind the host, that is in a password.
    if url.contains('@') || uri.query().is_some() {
        bail!("must have neither a password nor a query");
    }
    Ok(url.trim_end_matches('/').to_owned())
}

#[derive(Deserialize)]
struct Product<'a> {
    #[serde(borrow)]
    price: Option<&'a RawValue>,
}

/// `data.price` or `price`, a number or a string of one.
fn read(body: &[u8]) -> Answer {
    #[derive(Deserialize)]
    struct Enveloped<'a> {
        #[serde(borrow)]
        data: Option<&'a RawValue>,
        #[serde(borrow)]
        price: Option<&'a RawValue>,
    }
    let Ok(Enveloped { data, price }) = serde_json::from_slice(unmarked(body)) else {
        return Answer::Strange("its answer is no JSON object".to_owned());
    };
    let of_data = data.and_then(|data| serde_json::from_str::<Product<'_>>(data.get()).ok()?.price);
    match of_data.or(price).map(order::money) {
        Some(Ok(price)) => Answer::Price(price),
        Some(Err(reason)) => Answer::NoPrice(reason.to_string()),
        None => Answer::NoPrice("is missing".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn prices_are_read_digit_by_digit() {
        let price = |text| Answer::Price(Money::parse(text).unwrap());
        for (body, answer) in [
            (r#"{"status":"success","data":{"id":"p","price":29.990}}"#, price("29.990")),
            (r#"{"price":"0.1"}"#, price("0.1")),
            (r#"{"price":7,"data":null}"#, price("7")),
            (r#"{"price":7,"data":[]}"#, price("7")),
            (r#"{"price":7,"data":{"price":8}}"#, price("8")),
            (r#"{"data":{"name":"p"}}"#, Answer::NoPrice("is missing".into())),
            (r#"{"price":-1}"#, Answer::NoPrice("must not be negative".into())),
            (r#"{"price":1.00001}"#, Answer::NoPrice("must have at most 4 decimals".into())),
        ] {
            assert_eq!(read(body.as_bytes()), answer, "{body}");
        }
        for body in ["", "<html>", "[]", "7", "\"x\"", "null", r#"{"price":"#] {
            assert!(matches!(read(body.as_bytes()), Answer::Strange(_)), "{body}");
        }
        assert!(matches!(read(br#"{"price":{"amount":1}}"#), Answer::NoPrice(_)));
    }

    #[test]
    fn only_an_address_is_one() {
        assert_eq!(base("http://product-service:8002/").unwrap(), "http://product-service:8002");
        assert_eq!(base("https://shop/catalogue").unwrap(), "https://shop/catalogue");
        for other in [
            "",
            "product-service",
            "product-service:8002",
            "ftp://h",
            "http://",
            "http://u:p@h",
            "http://u:1/p@h",
            "http://h?x=1",
            "/p",
        ] {
            assert!(base(other).is_err(), "{other}");
        }
    }

    proptest! {
        #[test]
        fn no_answer_panics(body in r#"(\{|\[|"|data|price|:|,|[0-9eE.+-]|\}|\]){0,40}"#) {
            let _ = read(body.as_bytes());
        }
    }
}
