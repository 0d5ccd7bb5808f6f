//! What each order goes through in `api-service`: `make bench-micro`.

use std::time::Duration;

use api_service::hot::{self, Door, Table};
use divan::{AllocProfiler, Bencher, Divan, black_box, counter::BytesCount};
use mimalloc::MiMalloc;
use serde_json::value::RawValue;
use test_support::{marketplace_order, shop_order};
use uuid::Uuid;

/// Counts what it passes on to the allocator of the release.
#[global_allocator]
static ALLOCATOR: AllocProfiler<MiMalloc> = AllocProfiler::new(MiMalloc);

/// Long enough for a median that stays.
const EACH: Duration = Duration::from_millis(300);
const BODIES: [&str; 4] = ["marketplace 1", "marketplace 20", "shop 1", "shop 20"];
const WAITING: [usize; 2] = [0, 10_000];

fn main() {
    // With a recorder, as in the service: without one, gauges and counters cost nothing.
    let _metrics = shared::telemetry::metrics().expect("metrics");
    Divan::default().min_time(EACH).config_with_args().main();
}

fn body(name: &str) -> String {
    match name.split_once(' ') {
        Some(("marketplace", lines)) => marketplace_order(lines.parse().expect("lines")),
        Some((_, lines)) => shop_order(lines.parse().expect("lines")),
        None => panic!("{name}"),
    }
}

/// The fields of a body, by name.
#[divan::bench(args = BODIES)]
fn a_fields(bencher: Bencher<'_, '_>, name: &str) {
    let body = body(name);
    bencher.counter(BytesCount::of_str(&body)).bench(|| hot::fields(black_box(&body)).is_ok());
}

/// The same, and every rule checked.
#[divan::bench(args = BODIES)]
fn b_fields_and_checks(bencher: Bencher<'_, '_>, name: &str) {
    let (door, body) = (Door::open(), body(name));
    bencher.counter(BytesCount::of_str(&body)).bench(|| door.check(black_box(body.as_bytes())));
}

/// The part of the checks that looks at a payload's every value.
#[divan::bench(args = [1, 20])]
fn b_payload_digest(bencher: Bencher<'_, '_>, lines: usize) {
    #[derive(serde::Deserialize)]
    struct Body {
        payload: Box<RawValue>,
    }
    let Body { payload } = serde_json::from_str(&marketplace_order(lines)).expect("a payload");
    bencher.counter(BytesCount::of_str(payload.get())).bench(|| hot::digest(black_box(&payload)));
}

/// The row, and the event with its headers.
#[divan::bench(args = BODIES)]
fn c_row_and_event(bencher: Bencher<'_, '_>, name: &str) {
    let (door, body) = (Door::open(), body(name));
    bencher.with_inputs(|| door.check(body.as_bytes())).bench_values(|order| door.row(order));
}

/// All of that: from the body to what the writer's queue takes.
#[divan::bench(args = BODIES)]
fn d_body_to_row(bencher: Bencher<'_, '_>, name: &str) {
    let (door, body) = (Door::open(), body(name));
    bencher.counter(BytesCount::of_str(&body)).bench(|| door.row(door.check(black_box(body.as_bytes()))));
}

#[divan::bench(args = WAITING)]
fn e_wait_and_leave(bencher: Bencher<'_, '_>, others: usize) {
    let table = Table::with(others);
    bencher.with_inputs(Uuid::now_v7).bench_values(|id| table.come_and_go(id));
}

#[divan::bench(args = WAITING)]
fn e_wait_and_be_answered(bencher: Bencher<'_, '_>, others: usize) {
    let table = Table::with(others);
    let body = answer();
    bencher.with_inputs(Uuid::now_v7).bench_values(|id| table.wait(id, body.as_bytes()).is_some());
}

#[divan::bench(args = WAITING)]
fn e_answer_for_nobody(bencher: Bencher<'_, '_>, others: usize) {
    let table = Table::with(others);
    bencher.with_inputs(Uuid::now_v7).bench_values(|id| table.answer_nobody(id));
}

fn answer() -> String {
    let id = Uuid::now_v7();
    format!(
        r#"{{"correlation_id":"{id}","event_id":"{id}","order_id":"{id}","version":1,"status":"processed","order_status":"done","order_version":2,"amount":59.98,"currency":"BRL","processed_at":"2026-01-02T03:04:05.678901Z"}}"#
    )
}
