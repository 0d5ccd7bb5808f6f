//! The pages at `/docs`: Swagger UI, which shows `/openapi.json` and asks no other server for anything.

use axum::{
    extract::Path,
    http::{HeaderValue, header},
    response::{IntoResponse, Response},
};

use crate::error::Problem;

const HTML: &str = "text/html; charset=utf-8";
const CSS: &str = "text/css; charset=utf-8";
const JS: &str = "text/javascript; charset=utf-8";
const PNG: &str = "image/png";

macro_rules! files {
    ($($name:literal: $kind:expr,)*) => {
        [$(($name, $kind, include_bytes!(concat!("../../assets/swagger-ui/", $name)) as &[u8])),*]
    };
}

const FILES: [(&str, &str, &[u8]); 8] = files! {
    "index.html": HTML,
    "index.css": CSS,
    "swagger-ui.css": CSS,
    "swagger-ui-bundle.js": JS,
    "swagger-ui-standalone-preset.js": JS,
    "swagger-initializer.js": JS,
    "favicon-16x16.png": PNG,
    "favicon-32x32.png": PNG,
};

/// The page may load what this service sends, and nothing else.
const POLICY: HeaderValue = HeaderValue::from_static(
    "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; \
     connect-src 'self'; frame-ancestors 'none'",
);

/// `/docs/`
pub(super) async fn index() -> Response {
    send("index.html")
}

/// `/docs/{file}`
pub(super) async fn file(Path(name): Path<String>) -> Response {
    send(&name)
}

fn send(name: &str) -> Response {
    let Some((_, kind, bytes)) = FILES.into_iter().find(|(file, ..)| *file == name) else {
        return Problem::UnknownRoute("the pages begin at /docs/").into_response();
    };
    ([(header::CONTENT_TYPE, HeaderValue::from_static(kind)), (header::CONTENT_SECURITY_POLICY, POLICY)], bytes)
        .into_response()
}
