//! What each order goes through in both binaries: lifecycle, worth, and what goes over Kafka.
//! `make bench-micro`.

use std::time::Duration;

use divan::{AllocProfiler, Bencher, Divan, black_box};
use mimalloc::MiMalloc;
use rdkafka::message::OwnedHeaders;
use serde_json::value::RawValue;
use shared::{
    lifecycle::{Lifecycle, Lifecycles, Trigger, step},
    message::{Ack, AckStatus, Answer, Event, EventType, Headers, ReplyTo, now},
    money::Money,
    order::{Amounts, Content, worth},
};
use test_support::{marketplace_event, marketplace_order, shop_order};
use uuid::Uuid;

/// Counts what it passes on to the allocator of the release.
#[global_allocator]
static ALLOCATOR: AllocProfiler<MiMalloc> = AllocProfiler::new(MiMalloc);

/// Long enough for a median that stays.
const EACH: Duration = Duration::from_millis(300);
const LINES: [usize; 2] = [1, 20];

fn main() {
    Divan::default().min_time(EACH).config_with_args().main();
}

#[divan::bench(args = ["marketplace", "payment"])]
fn step_create_handled(bencher: Bencher<'_, '_>, name: &str) {
    let lifecycle = lifecycle(name);
    bencher.bench(|| step(lifecycle, black_box(&lifecycle.initial), Trigger::CreateHandled).is_ok());
}

#[divan::bench]
fn step_fired(bencher: Bencher<'_, '_>) {
    let lifecycle = lifecycle("payment");
    bencher.bench(|| step(lifecycle, black_box("PENDING"), Trigger::Fired(black_box("paid"))).is_ok());
}

#[divan::bench(args = LINES)]
fn worth_of_payload(bencher: Bencher<'_, '_>, lines: usize) {
    let payload = raw(&marketplace_order(lines), "payload");
    bencher.bench(|| {
        let payload = Some(&**black_box(&payload));
        worth(&Content { payload, currency: Some("BRL"), ..Content::default() }, Amounts::Payable)
    });
}

#[divan::bench(args = LINES)]
fn worth_of_own_items(bencher: Bencher<'_, '_>, lines: usize) {
    let items = raw(&shop_order(u32::try_from(lines).expect("lines")), "items");
    bencher.bench(|| {
        let items = Some(&**black_box(&items));
        worth(&Content { items, currency: Some("EUR"), ..Content::default() }, Amounts::Payable)
    });
}

#[divan::bench]
fn money_parse(bencher: Bencher<'_, '_>) {
    bencher.bench(|| Money::parse(black_box("415.28")));
}

#[divan::bench]
fn money_to_json(bencher: Bencher<'_, '_>) {
    let money = Money::parse("415.28").expect("money");
    bencher.bench(|| serde_json::to_string(black_box(&money)));
}

#[divan::bench(args = LINES)]
fn event_to_json(bencher: Bencher<'_, '_>, lines: usize) {
    let json = marketplace_event(lines);
    let event: Event<'_> = serde_json::from_str(&json).expect("an event");
    bencher.bench(|| serde_json::to_string(black_box(&event)));
}

#[divan::bench(args = LINES)]
fn event_from_json(bencher: Bencher<'_, '_>, lines: usize) {
    let json = marketplace_event(lines).into_bytes();
    bencher.bench(|| serde_json::from_slice::<Event<'_>>(black_box(&json)).is_ok());
}

#[divan::bench]
fn headers_made(bencher: Bencher<'_, '_>) {
    bencher.bench(headers);
}

#[divan::bench]
fn headers_to_json(bencher: Bencher<'_, '_>) {
    let headers = headers();
    bencher.bench(|| black_box(&headers).to_json());
}

#[divan::bench]
fn headers_to_record(bencher: Bencher<'_, '_>) {
    let headers = headers();
    bencher.bench(|| black_box(&headers).to_record());
}

#[divan::bench]
fn headers_of_record(bencher: Bencher<'_, '_>) {
    let record: OwnedHeaders = headers().to_record();
    bencher.bench(|| Headers::of_record(Some(black_box(&record).as_borrowed())));
}

#[divan::bench]
fn ack_to_json(bencher: Bencher<'_, '_>) {
    let ack = ack();
    bencher.bench(|| serde_json::to_string(black_box(&ack)));
}

#[divan::bench]
fn answer_of_ack(bencher: Bencher<'_, '_>) {
    let json = serde_json::to_vec(&ack()).expect("JSON");
    bencher.bench(|| serde_json::from_slice::<Answer>(black_box(&json)));
}

fn lifecycle(name: &str) -> &'static Lifecycle {
    Lifecycles::embedded().expect("lifecycles").find(name).expect("a lifecycle")
}

fn raw(body: &str, field: &str) -> Box<RawValue> {
    let body: serde_json::Map<_, _> = serde_json::from_str(body).expect("an object");
    serde_json::value::to_raw_value(&body[field]).expect("JSON")
}

fn headers() -> Headers {
    let id = Uuid::nil();
    let mut headers = Headers::cloud_event(id, EventType::Created.name(), "/orderstream/api-service", now());
    headers.push("traceparent", "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01");
    let correlation = id.as_bytes().to_vec();
    headers.push_reply_to(&ReplyTo { correlation, topic: "orders.ack".to_owned(), partition: Some(3) });
    headers
}

fn ack() -> Ack {
    let answer = Answer {
        status: AckStatus::Processed,
        order_status: "done".to_owned(),
        order_version: 2,
        amount: Some(Money::parse("415.28").expect("money")),
        currency: Some("BRL".to_owned()),
        error: None,
        superseded_by: None,
    };
    let (correlation_id, event_id, order_id) = (Uuid::now_v7(), Uuid::now_v7(), Uuid::now_v7());
    Ack { correlation_id, event_id, order_id, version: 1, answer, processed_at: now() }
}
