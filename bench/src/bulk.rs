//! Many orders in one request (`POST /orders/bulk`), beside as many requests: how fast, and in how
//! much memory; and what becomes of them when the connection is cut at half and all is sent again.

use std::time::Duration;

use anyhow::{Context, bail, ensure};
use bytes::{Bytes, BytesMut};
use http_body_util::BodyExt as _;
use http_body_util::channel::{Channel, Sender};
use hyper::body::Incoming;
use hyper::client::conn::http1;
use hyper::header::{CONTENT_TYPE, HOST};
use hyper::{Method, Request, StatusCode};
use hyper_util::rt::TokioIo;
use serde::Deserialize;
use tokio::net::TcpStream;
use tokio::task::JoinHandle;
use tokio::time::{Instant, MissedTickBehavior, interval};

use client::money::grouped_count;
use client::table;

use crate::ground::{self, Ground, Servers, step};
use crate::http::Address;
use crate::load_orders::Bodies;
use crate::measure::{Bench, Load, Mode};
use crate::process;
use crate::product::{Memory, Product};
use crate::report::mib;

const SINGLE_CALLERS: usize = 256;
const PIECE: usize = 64 * 1024;
const LOOK: Duration = Duration::from_millis(250);

/// What a request for many came to.
struct Sent {
    answered: u64,
    created: u64,
    repeated: u64,
    took: Duration,
    /// At the start, and the most until its end.
    memory: [Memory; 2],
}

#[derive(Deserialize)]
struct Last {
    summary: Summary,
}

#[derive(Deserialize)]
struct Summary {
    lines: u64,
    created: u64,
    repeated: u64,
    failed: u64,
    complete: bool,
}

/// The table.
///
/// # Errors
/// When a line was answered otherwise than it should be, or an order is there twice or not at all.
pub async fn run(servers: &Servers, lines: u64, interrupted: impl Future<Output = ()>) -> anyhow::Result<String> {
    ground::used(servers, false, interrupted, async |ground| measure(ground, lines).await).await
}

async fn measure(ground: &Ground, lines: u64) -> anyhow::Result<String> {
    let mut product = ground.start(&process::own_folder()?, &[]).await?;
    let mut bench = Bench::new(Duration::from_secs(3), Duration::from_secs(10));
    let mut single = 0.0;
    for what in ["not counted, to warm up", "single"] {
        single = bench.point(&mut product, Load::closed(Mode::Accepted, SINGLE_CALLERS)).await?.load.per_second;
        step(&format!("{what}: {SINGLE_CALLERS} callers, {single:.0}/s"));
    }

    let whole = send(&product, 1, lines, lines).await?;
    ensure!(whole.created == lines, "{} of {lines} orders were created", whole.created);
    bench.ledger.accepted += whole.created;
    let began = Instant::now();
    product.wait_until_handled(bench.ledger.accepted).await?;
    step(&format!("handled by the worker {:.1} s later", began.elapsed().as_secs_f64()));

    let cut = send(&product, 2, lines, lines / 2).await?;
    step(&format!("cut after {} answers; sending all again", grouped_count(cut.answered)));
    let again = send(&product, 2, lines, lines).await?;
    let (repeated, created) = (again.repeated, again.created);
    ensure!(repeated + created == lines && repeated >= cut.answered, "{repeated} repeated and {created} created");
    bench.ledger.accepted += lines;
    product.wait_until_handled(bench.ledger.accepted).await?;
    bench.check(&ground.database).await?;
    product.stop().await?;

    let rate = |sent: &Sent| sent.answered as f64 / sent.took.as_secs_f64();
    let row = |name: &str, sent: &Sent| {
        let [before, most] = sent.memory;
        vec![
            name.to_owned(),
            grouped_count(sent.answered),
            grouped_count(sent.repeated),
            grouped_count(rate(sent) as u64),
            format!("{:.2}", rate(sent) / single),
            format!("{:.1} → {:.1}", mib(before.api), mib(most.api)),
            format!("{:.1} → {:.1}", mib(before.worker), mib(most.worker)),
        ]
    };
    let header =
        ["bulk", "lines answered", "repeated", "per s", "× single POSTs", "api-service MiB", "worker MiB, at most"];
    Ok(format!(
        "{}\nSingle POSTs, {SINGLE_CALLERS} callers, accepted: {} per s. Ledger: {} accepted = {} stored = {} handled.\n",
        table::markdown(&header, &[row("all", &whole), row("cut at half", &cut), row("all again", &again)]),
        grouped_count(single as u64),
        grouped_count(bench.ledger.accepted),
        grouped_count(bench.ledger.stored),
        grouped_count(bench.ledger.handled),
    ))
}

/// The lines of one `run` (the same again for the same number); the connection is cut after so many
/// answers, where that is less than all.
async fn send(product: &Product, run: u64, lines: u64, until: u64) -> anyhow::Result<Sent> {
    let address = product.address();
    let (sender, body) = Channel::new(4);
    let (response, connection) = open(address, body).await?;
    let writing = tokio::spawn(write(sender, run, lines));
    let first = product.memory()?;
    let (began, mut most, mut look) = (Instant::now(), first, interval(LOOK));
    look.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut body = response.await?;
    let (mut answered, mut rest) = (0, BytesMut::new());
    loop {
        let frame = tokio::select! {
            frame = body.frame() => frame,
            _ = look.tick() => {
                let now = product.memory()?;
                most = Memory { api: most.api.max(now.api), worker: most.worker.max(now.worker) };
                continue;
            }
        };
        let Some(frame) = frame else { break };
        let frame = frame.context("the answer broke off")?;
        rest.extend_from_slice(frame.data_ref().map_or(&[], |data| data));
        // The last line stays for the end.
        while let Some(end) = rest.iter().position(|byte| *byte == b'\n').filter(|end| end + 1 < rest.len()) {
            let _ = rest.split_to(end + 1);
            answered += 1;
        }
        if until < lines && answered >= until {
            // First, or the lines would seem to end here.
            connection.abort();
            writing.abort();
            let sent = Sent { answered, created: answered, repeated: 0, took: began.elapsed(), memory: [first, most] };
            return Ok(sent);
        }
    }
    let took = began.elapsed();
    writing.await.context("writing the lines")??;
    let Last { summary } = serde_json::from_slice(&rest)
        .with_context(|| format!("the last line is no summary: {}", String::from_utf8_lossy(&rest)))?;
    ensure!(summary.complete && summary.failed == 0, "{} lines failed", summary.failed);
    ensure!(summary.lines == lines && answered == lines, "{answered} of {lines} lines were answered");
    step(&format!("{lines} lines in {:.1} s", took.as_secs_f64()));
    Ok(Sent { answered, created: summary.created, repeated: summary.repeated, took, memory: [first, most] })
}

/// The answer's body, as soon as it begins: which it may before the request's has ended.
async fn open(
    address: &Address,
    body: Channel<Bytes>,
) -> anyhow::Result<(impl Future<Output = anyhow::Result<Incoming>>, JoinHandle<()>)> {
    let stream = TcpStream::connect(address.authority()).await.context("connecting")?;
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await.context("HTTP handshake")?;
    let connection = tokio::spawn(async move { drop(connection.await) });
    let request = Request::builder()
        .method(Method::POST)
        .uri(address.path("/orders/bulk")?)
        .header(HOST, address.authority())
        .header(CONTENT_TYPE, "application/x-ndjson")
        .body(body)?;
    let response = async move {
        let response = sender.send_request(request).await.context("no answer")?;
        if response.status() != StatusCode::OK {
            bail!("answered {}", response.status());
        }
        Ok(response.into_body())
    };
    Ok((response, connection))
}

async fn write(mut sender: Sender<Bytes>, run: u64, lines: u64) -> anyhow::Result<()> {
    let bodies = Bodies::new(run);
    let mut piece = BytesMut::with_capacity(2 * PIECE);
    for line in 1..=lines {
        piece.extend_from_slice(&bodies.next());
        piece.extend_from_slice(b"\n");
        if piece.len() >= PIECE || line == lines {
            sender.send_data(piece.split().freeze()).await.context("the connection broke off")?;
        }
    }
    Ok(())
}
