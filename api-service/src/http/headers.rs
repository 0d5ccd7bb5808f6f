//! What is said with every answer: that it is data and not a page, and which pages of others may
//! read it (CORS).

use std::{str::FromStr, time::Duration};

use axum::{
    http::{HeaderMap, HeaderName, HeaderValue, Method, Uri, header},
    response::Response,
};
use tower_http::cors::{AllowHeaders, AllowOrigin, CorsLayer};

use super::prefer::PREFERENCE_APPLIED;
use crate::rate::RATE_LIMIT;

/// How long a browser remembers what it was allowed to ask.
const PREFLIGHT_AGE: Duration = Duration::from_secs(600);

/// Orders hold names and addresses of people: nobody on the way keeps them. Where a handler has
/// said otherwise, that stands.
pub(crate) fn guard(mut response: Response) -> Response {
    let headers = response.headers_mut();
    let is_page = headers.get(header::CONTENT_TYPE).is_some_and(|kind| kind.as_bytes().starts_with(b"text/html"));
    headers.insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    headers.entry(header::REFERRER_POLICY).or_insert(HeaderValue::from_static("no-referrer"));
    headers.entry(header::CACHE_CONTROL).or_insert(HeaderValue::from_static("no-store"));
    if !is_page {
        const NOTHING: HeaderValue = HeaderValue::from_static("default-src 'none'; frame-ancestors 'none'");
        headers.entry(header::CONTENT_SECURITY_POLICY).or_insert(NOTHING);
    }
    response
}

/// Tells where our paths are for a caller, who writes this before them.
pub(crate) fn put_before(headers: &mut HeaderMap, prefix: &str) {
    for (name, start) in [(header::LOCATION, "/"), (header::LINK, "</")] {
        let Some(value) = headers.get(&name).and_then(|value| value.to_str().ok()) else { continue };
        // Others are relative, and right as they are.
        if let Some(rest) = value.strip_prefix(start)
            && let Ok(value) = HeaderValue::try_from(format!("{}{prefix}/{rest}", start.trim_end_matches('/')))
        {
            headers.insert(name, value);
        }
    }
}

/// Whose pages may call from a browser (`CORS_ALLOWED_ORIGINS`).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Origins {
    #[default]
    None,
    All,
    These(Vec<HeaderValue>),
}

impl FromStr for Origins {
    type Err = String;

    /// `https://shop.example,http://localhost:3000`, or `*`.
    fn from_str(text: &str) -> Result<Self, String> {
        let origins: Vec<&str> = text.split(',').map(str::trim).filter(|origin| !origin.is_empty()).collect();
        match origins.as_slice() {
            [] if text.trim().is_empty() => Ok(Self::None),
            [] => Err("names no origin".to_owned()),
            ["*"] => Ok(Self::All),
            origins => origins.iter().map(|text| origin(text)).collect::<Result<_, _>>().map(Self::These),
        }
    }
}

/// As browsers send it: scheme, host, and the port where it is not the usual one.
fn origin(text: &str) -> Result<HeaderValue, String> {
    let refused =
        || format!("\"{text}\" is no origin: give https://host or http://host:port, without a path, or * alone");
    let uri: Uri = text.parse().map_err(|_| refused())?;
    let (Some("http" | "https"), Some(authority)) = (uri.scheme_str(), uri.authority()) else { return Err(refused()) };
    let usual = match uri.scheme_str() {
        Some("https") => Some(443),
        _ => Some(80),
    };
    let is_bare = text.ends_with(authority.as_str()) && !authority.as_str().contains('@');
    if !is_bare || uri.port_u16() == usual || authority.host().contains('*') || text != text.to_ascii_lowercase() {
        return Err(refused());
    }
    HeaderValue::try_from(text).map_err(|_| refused())
}

/// What browsers' tracing and monitoring adds to each request of a page.
pub(crate) const TRACING_HEADERS: &str = "baggage,sentry-trace,b3,x-b3-traceid,x-b3-spanid,x-b3-parentspanid,\
    x-b3-sampled,x-b3-flags,uber-trace-id,newrelic,elastic-apm-traceparent,x-datadog-trace-id,x-datadog-parent-id,\
    x-datadog-origin,x-datadog-sampling-priority,x-datadog-sampled,x-datadog-tags,x-cloud-trace-context,\
    x-amzn-trace-id,request-id,request-context,x-correlation-id,x-requested-with";

/// What else than our own headers those pages may send (`CORS_ALLOWED_HEADERS`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum AllowedHeaders {
    All,
    These(Vec<HeaderName>),
}

impl FromStr for AllowedHeaders {
    type Err = String;

    /// `baggage,sentry-trace`, or `*`.
    fn from_str(text: &str) -> Result<Self, String> {
        let names: Vec<&str> = text.split(',').map(str::trim).filter(|name| !name.is_empty()).collect();
        if names == ["*"] {
            return Ok(Self::All);
        }
        let name = |name: &&str| match name.parse::<HeaderName>() {
            Ok(parsed) if !name.contains('*') => Ok(parsed),
            _ => Err(format!("{name:?} is no name of a header; give names between commas, or * alone")),
        };
        names.iter().map(name).collect::<Result<_, _>>().map(Self::These)
    }
}

/// Answers what browsers ask before they ask, before anybody is asked who it is.
pub(crate) fn cors(origins: &Origins, beside_ours: &AllowedHeaders) -> Option<CorsLayer> {
    let origins = match origins {
        Origins::None => return None,
        Origins::All => AllowOrigin::any(),
        Origins::These(origins) => AllowOrigin::list(origins.iter().cloned()),
    };
    let own =
        |names: &[&'static str]| -> Vec<HeaderName> { names.iter().map(|n| HeaderName::from_static(n)).collect() };
    let taken = match beside_ours {
        // A plain * would not be taken for Authorization.
        AllowedHeaders::All => AllowHeaders::mirror_request(),
        AllowedHeaders::These(names) => {
            let ours =
                ["prefer", "idempotency-key", "x-user-id", "x-user-role", "x-request-id", "traceparent", "tracestate"];
            let mut taken = own(&ours);
            taken.extend([header::CONTENT_TYPE, header::AUTHORIZATION, header::IF_MATCH, header::IF_NONE_MATCH]);
            // A reader of events that asks as EventSource does.
            taken.extend(own(&["last-event-id", "cache-control", "accept"]));
            taken.extend(names.iter().filter(|name| !taken.contains(name)).cloned().collect::<Vec<_>>());
            AllowHeaders::list(taken)
        }
    };
    let mut shown = own(&["idempotency-replayed", "x-request-id", "ratelimit-policy"]);
    shown.extend([header::LOCATION, header::ETAG, header::LINK, header::RETRY_AFTER, PREFERENCE_APPLIED, RATE_LIMIT]);
    shown.extend([header::ALLOW, header::WWW_AUTHENTICATE]);
    Some(
        CorsLayer::new()
            .allow_origin(origins)
            .allow_methods([Method::GET, Method::POST, Method::PUT, Method::PATCH])
            .allow_headers(taken)
            .expose_headers(shown)
            .max_age(PREFLIGHT_AGE),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn our_paths_are_told_behind_the_prefix_and_others_as_they_are() {
        let mut headers = HeaderMap::new();
        headers.insert(header::LOCATION, HeaderValue::from_static("/orders/1"));
        headers.insert(header::LINK, HeaderValue::from_static("</orders?cursor=x>; rel=\"next\""));
        put_before(&mut headers, "/shop-api");
        assert_eq!(headers[header::LOCATION], "/shop-api/orders/1");
        assert_eq!(headers[header::LINK], "</shop-api/orders?cursor=x>; rel=\"next\"");
        headers.insert(header::LOCATION, HeaderValue::from_static("docs/"));
        put_before(&mut headers, "/shop-api");
        assert_eq!(headers[header::LOCATION], "docs/");
    }

    #[test]
    fn allowed_headers_are_names_or_all() {
        let these = |text: &str| match text.parse() {
            Ok(AllowedHeaders::These(names)) => names.len(),
            other => panic!("{text}: {other:?}"),
        };
        assert_eq!(these("Baggage, sentry-trace,"), 2);
        assert_eq!(these(""), 0);
        assert!(these(TRACING_HEADERS) > 20);
        assert_eq!("*".parse(), Ok(AllowedHeaders::All));
        for bad in ["x-datadog-*", "*,baggage", "a b", "ä", "x:y"] {
            assert!(bad.parse::<AllowedHeaders>().is_err(), "{bad}");
        }
    }

    #[test]
    fn origins_are_as_browsers_send_them() {
        let these = |text: &str| match text.parse() {
            Ok(Origins::These(origins)) => origins.len(),
            other => panic!("{text}: {other:?}"),
        };
        assert_eq!(these("https://shop.example, http://localhost:3000,"), 2);
        assert_eq!("".parse(), Ok(Origins::None));
        assert_eq!("*".parse(), Ok(Origins::All));
        for bad in [
            "shop.example",
            "https://shop.example/",
            "https://shop.example/path",
            "https://shop.example:443",
            "https://Shop.example",
            "https://u@shop.example",
            "https://*.example",
            "null",
            "ftp://shop.example",
            "*,https://shop.example",
            "https://",
        ] {
            assert!(bad.parse::<Origins>().is_err(), "{bad}");
        }
    }
}
