//! The ceiling of HTTP: a server of hyper that reads a body and answers, and does nothing else. The
//! same load generator asks it.

use std::convert::Infallible;
use std::process::Stdio;

use anyhow::Context;
use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::header::{CONTENT_TYPE, HeaderValue};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::net::TcpListener;
use tokio::process::{Child, Command};

/// As long as the service's own.
const ANSWER: &str = r#"{"order_id":"00000000-0000-7000-8000-000000000000","status":"created","version":1,"order_status":"done","order_version":2,"amount":59.98,"currency":"BRL","correlation_id":"00000000-0000-7000-8000-000000000000","external_id":"00000000000000000000000000000000"}"#;

/// The server, in a process of its own.
pub struct Bare {
    pub url: String,
    _child: Child,
}

impl Bare {
    pub async fn start() -> anyhow::Result<Self> {
        let own = std::env::current_exe().context("finding this program")?;
        let mut child = Command::new(own)
            .arg("bare-http")
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .context("starting a bare HTTP server")?;
        let stdout = child.stdout.take().context("no standard output")?;
        let url = BufReader::new(stdout).lines().next_line().await?.context("the bare HTTP server ended at once")?;
        Ok(Self { url, _child: child })
    }
}

/// The hidden subcommand: prints its URL and serves until it is killed.
pub async fn serve() -> anyhow::Result<()> {
    let listener = TcpListener::bind("127.0.0.1:0").await.context("listening")?;
    println!("http://{}", listener.local_addr().context("listening")?);
    loop {
        let (stream, _) = listener.accept().await.context("accepting")?;
        stream.set_nodelay(true).context("setting TCP_NODELAY")?;
        tokio::spawn(http1::Builder::new().serve_connection(TokioIo::new(stream), service_fn(answer)));
    }
}

async fn answer(request: Request<Incoming>) -> Result<Response<Full<Bytes>>, Infallible> {
    let read = request.into_body().collect().await;
    let mut response = Response::new(Full::new(Bytes::from_static(ANSWER.as_bytes())));
    *response.status_mut() = if read.is_ok() { StatusCode::CREATED } else { StatusCode::BAD_REQUEST };
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    Ok(response)
}
