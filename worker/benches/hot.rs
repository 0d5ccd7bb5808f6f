//! What each event goes through in `worker`, each step with those before it: `make bench-micro`.

use std::time::Duration;

use divan::{AllocProfiler, Bencher, Divan};
use mimalloc::MiMalloc;
use shared::message::{EventType, Headers, ReplyTo, now};
use test_support::marketplace_event;
use uuid::Uuid;
use worker::hot::Desk;

/// Counts what it passes on to the allocator of the release.
#[global_allocator]
static ALLOCATOR: AllocProfiler<MiMalloc> = AllocProfiler::new(MiMalloc);

/// Long enough for a median that stays.
const EACH: Duration = Duration::from_millis(300);
const LINES: [usize; 2] = [1, 20];

fn main() {
    Divan::default().min_time(EACH).config_with_args().main();
}

#[divan::bench(args = LINES)]
fn a_read(bencher: Bencher<'_, '_>, lines: usize) {
    let desk = desk(lines);
    bencher.bench(|| desk.read().is_ok());
}

#[divan::bench(args = LINES)]
fn b_read_and_handle(bencher: Bencher<'_, '_>, lines: usize) {
    let desk = desk(lines);
    assert!(desk.handle().is_ok_and(|answer| answer.order_status == "done"));
    bencher.bench(|| desk.handle());
}

#[divan::bench(args = LINES)]
fn c_read_handle_and_reply(bencher: Bencher<'_, '_>, lines: usize) {
    let desk = desk(lines);
    bencher.bench(|| desk.reply());
}

fn desk(lines: usize) -> Desk {
    let id = Uuid::nil();
    let mut headers = Headers::cloud_event(id, EventType::Created.name(), "/orderstream/api-service", now());
    headers.push("traceparent", "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01");
    let correlation = id.as_bytes().to_vec();
    headers.push_reply_to(&ReplyTo { correlation, topic: "orders.ack".to_owned(), partition: Some(3) });
    Desk::with(headers, marketplace_event(lines).into_bytes())
}
