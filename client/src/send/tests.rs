use std::collections::HashMap;
use std::path::Path;
use std::sync::Mutex;

use bytes::Bytes;
use test_support::stand_in::{Asked, respond, serve};

use super::*;
use crate::http::Identity;

const DEMO_ORDERS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/demo-orders.ndjson");

fn orders() -> Vec<SampleOrder> {
    sample::read(Path::new(DEMO_ORDERS)).expect("the demo orders")
}

fn options(url: String) -> Options {
    let service = Service::new(&url, &Identity::default()).expect("a URL");
    Options { service, concurrency: 4, wait: 7 }
}

/// Answers as the service does: 201 the first time, 200 after it, with the amount of the items.
fn service() -> impl Fn(Asked) -> hyper::Response<String> + Send + Sync {
    let amounts: HashMap<Bytes, Decimal> = orders().into_iter().map(|order| (order.body, order.amount)).collect();
    let seen = Mutex::new(Vec::new());
    move |asked| {
        if asked.path == "/health" {
            return respond(200, r#"{"status":"ok"}"#);
        }
        assert_eq!((asked.path.as_str(), asked.prefer.as_deref()), ("/orders", Some("wait=7")));
        let amount = amounts[&asked.body];
        let mut seen = seen.lock().expect("the lock");
        let status = if seen.contains(&asked.body) { 200 } else { 201 };
        seen.push(asked.body);
        // One has been deleted after the first run.
        let (own, order) = if seen.len() == 13 { ("deleted", "deleted") } else { ("created", "done") };
        respond(status, &format!(r#"{{"status":"{own}","order_status":"{order}","amount":{amount}}}"#))
    }
}

#[tokio::test]
async fn the_second_run_repeats_every_order_and_both_sums_are_the_files() {
    let options = options(serve(service()).await);
    let first = run(&options, orders()).await.expect("a first run");
    assert_eq!((first.created, first.repeated, first.is_good()), (12, 0, true), "{first}");
    let second = run(&options, orders()).await.expect("a second run");
    assert_eq!((second.created, second.repeated, second.is_good()), (0, 12, true), "{second}");
}

#[tokio::test]
async fn a_503_and_a_broken_off_answer_are_sent_again() {
    let good = service();
    let refusals = AtomicUsize::new(0);
    let url = serve(move |asked| {
        if asked.path == "/orders" && refusals.fetch_add(1, Ordering::Relaxed) < 3 {
            let mut refusal = respond(503, r#"{"detail":"away"}"#);
            refusal.headers_mut().insert(RETRY_AFTER, HeaderValue::from_static("0"));
            return refusal;
        }
        good(asked)
    });
    let summary = run(&options(url.await), orders()).await.expect("a run");
    assert_eq!((summary.created, summary.is_good()), (12, true), "{summary}");
}

#[tokio::test]
async fn a_missing_answer_or_a_wrong_amount_is_not_good() {
    for (status, body) in [
        (202, r#"{"status":"created"}"#),
        (201, r#"{"status":"created","order_status":"done","amount":1}"#),
        (201, r#"{"status":"created"}"#),
        (201, r#"{"status":"deleted","order_status":"deleted"}"#),
        (422, r#"{"detail":"no such currency"}"#),
        (500, "oops"),
    ] {
        let url =
            serve(move |asked| if asked.path == "/health" { respond(200, "") } else { respond(status, body) }).await;
        let summary = run(&options(url), orders()).await.expect("a run");
        assert!(!summary.is_good(), "{status} {body} gave\n{summary}");
        let shown = summary.to_string();
        let told =
            [("no such currency", 422), ("oops", 500)].iter().all(|(says, of)| *of != status || shown.contains(says));
        assert!(shown.contains("DIFFERENT") && told, "{shown}");
    }
}

#[tokio::test]
async fn a_service_that_is_not_there_is_one_clear_error() {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let url = format!("http://{}", listener.local_addr().expect("its address"));
    drop(listener);
    let error = run(&options(url.clone()), orders()).await.err().expect("an error");
    let shown = format!("{error:#}");
    assert!(shown.contains(&url) && shown.contains("ORDERSTREAM_URL"), "{shown}");
}

#[tokio::test]
async fn another_service_on_that_port_is_told_apart() {
    let url = serve(|_| respond(404, "not here")).await;
    let error = run(&options(url), orders()).await.err().expect("an error");
    assert!(error.to_string().contains("is not the order service"), "{error:#}");
}
