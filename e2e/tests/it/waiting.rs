//! A caller that waits gets its answer or an honest "not yet", on time, and leaves nothing behind.

use std::time::Duration;

use serde_json::json;
use test_support::{Accepted, CommitGate, HttpClient, System, alone, beside_others, eventually, order, wait_for};
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;

const TOLERANCE: Duration = Duration::from_millis(100);

#[tokio::test(flavor = "multi_thread")]
async fn without_a_worker_a_waiting_post_ends_in_202_at_its_deadline() {
    let _turn = alone().await;
    let system = System::new().await;
    let api = system.api_with(&[("ACK_WAIT_MS", "700"), ("ACK_WAIT_MAX_MS", "1500")]).await;
    let mut pending = Vec::new();

    for (prefer, deadline, applied) in [
        (None, 700, None),
        (Some("wait=1"), 1_000, Some("wait=1")),
        // Capped, and said so only as what was really done.
        (Some("wait=60"), 1_500, None),
    ] {
        let headers: Vec<_> = prefer.map(|prefer| ("prefer", prefer)).into_iter().collect();
        let reply = api.http().post_order_with(&order("user"), &headers).await.expect_status(202);
        let deadline = Duration::from_millis(deadline);
        let off = reply.took.abs_diff(deadline);
        assert!(off <= TOLERANCE, "{prefer:?} ended after {:?}, not {deadline:?}", reply.took);
        let order_id = reply.text("order_id");
        assert_eq!(reply.header("location"), Some(format!("/orders/{order_id}").as_str()));
        assert!(reply.header("retry-after").is_some(), "{}", reply.summary());
        assert_eq!(reply.number("version"), 1);
        if applied.is_some() {
            assert_eq!(reply.header("preference-applied"), applied);
        }
        let path = format!("/orders/{order_id}/requests/{}", reply.text("correlation_id"));
        let request = api.http().get(&path).await.expect_status(200).json();
        assert_eq!(request["state"], "pending", "{request}");
        pending.push((path, Accepted::from(&reply)));
    }
    assert_eq!(api.http().metric("orderstream_waiters").await, 0.0);
    assert_eq!(api.http().metric("orderstream_requests_timed_out_total").await, 3.0);

    // Any replica knows, also one that was not there.
    let other = system.api().await;
    let _worker = system.worker().await;
    for (path, _) in &pending {
        let request = eventually("the request to be done", || async {
            let request = other.http().get(path).await.expect_status(200).json();
            if request["state"] == "done" { Ok(request) } else { Err(request.to_string()) }
        })
        .await;
        assert_eq!(request["version"], 1, "{request}");
        assert_eq!(request["order_status"], "done", "{request}");
        assert_eq!(request["order_version"], 2, "{request}");
    }
    system.ledger().check(pending.into_iter().map(|(_, accepted)| accepted)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_repeat_waits_for_the_first_orders_answer() {
    let _turn = alone().await;
    let system = System::new().await;
    let (api, other) = (system.api().await, system.api().await);
    let mut sent = order("user");
    sent["external_id"] = json!("market-1");
    let first = api.http().post_order_async(&sent).await.expect_status(201);

    let repeat = other.http().post_order_with(&sent, &[("prefer", "wait=1")]).await.expect_status(202);
    assert!(repeat.took.abs_diff(Duration::from_secs(1)) <= TOLERANCE, "ended after {:?}", repeat.took);
    assert_eq!(repeat.text("order_id"), first.text("order_id"));

    let waiting = other.shared_http();
    let repeat = tokio::spawn(async move { waiting.post_order_with(&sent, &[("prefer", "wait=20")]).await });
    waiters_become(other.http(), 1.0).await;
    let _worker = system.worker().await;
    let repeat = repeat.await.expect("no panic").expect_status(200);
    assert_eq!(repeat.text("order_status"), "done");
    assert_eq!(repeat.header("preference-applied"), Some("wait=20"));
    waiters_become(other.http(), 0.0).await;
    system.ledger().check([Accepted::from(&first)]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hundred_waiters_are_counted_while_they_wait_and_forgotten_afterwards() {
    let _turn = alone().await;
    let system = System::new().await;
    let api = system.api().await;
    let post_all = |wait: &'static str| -> Vec<_> {
        (0..100)
            .map(|_| {
                let http = api.shared_http();
                tokio::spawn(async move { http.post_order_with(&order("user"), &[("prefer", wait)]).await })
            })
            .collect()
    };
    // So that a hundred connections are there: to open them all at once is not the deadline's to hold.
    for post in post_all("wait=1") {
        post.await.expect("no panic").expect_status(202);
    }
    let posts = post_all("wait=3");
    waiters_become(api.http(), 100.0).await;
    for post in posts {
        let reply = post.await.expect("no panic").expect_status(202);
        let deadline = Duration::from_secs(3);
        assert!(reply.took.abs_diff(deadline) <= TOLERANCE, "ended after {:?}", reply.took);
    }
    waiters_become(api.http(), 0.0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_caller_that_hangs_up_leaves_no_waiter() {
    let _turn = beside_others().await;
    let system = System::new().await;
    let api = system.api().await;
    let body = order("user").to_string();
    let request = format!(
        "POST /orders HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\nprefer: wait=30\r\n\
         content-length: {}\r\n\r\n{body}",
        body.len()
    );
    let mut connection = TcpStream::connect(api.http().address()).await.expect("connecting");
    connection.write_all(request.as_bytes()).await.expect("sending");
    waiters_become(api.http(), 1.0).await;
    drop(connection);
    waiters_become(api.http(), 0.0).await;

    // It left, the order stays.
    let _worker = system.worker().await;
    system.ledger().check([]).await;
    assert_eq!(system.db.number("select count(*) from orders where status = 'done'", &[]).await, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn beyond_max_waiters_a_post_is_accepted_and_not_parked() {
    let _turn = beside_others().await;
    let system = System::new().await;
    let api = system.api_with(&[("MAX_WAITERS", "1")]).await;
    let http = api.shared_http();
    let parked = tokio::spawn(async move { http.post_order_with(&order("one"), &[("prefer", "wait=25")]).await });
    waiters_become(api.http(), 1.0).await;
    let reply = api.http().post_order_with(&order("two"), &[("prefer", "wait=25")]).await.expect_status(202);
    assert!(reply.took < Duration::from_secs(5), "it was parked for {:?}", reply.took);

    let _worker = system.worker().await;
    let first = parked.await.expect("no panic").expect_status(201);
    system.ledger().check([Accepted::from(&first), Accepted::from(&reply)]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_earlier_update_is_answered_as_superseded_by_the_later_one() {
    let _turn = beside_others().await;
    let system = System::new().await;
    let api = system.api().await;
    let order_id = api.http().post_order_async(&order("user")).await.expect_status(201).text("order_id");
    let http = api.shared_http();
    let change = json!({ "order_id": order_id, "notes": "first" });
    let earlier = tokio::spawn(async move { http.post_order_with(&change, &[("prefer", "wait=25")]).await });
    waiters_become(api.http(), 1.0).await;
    let change = json!({ "order_id": order_id, "notes": "second" });
    let later = api.http().post_order_async(&change).await.expect_status(200);
    assert_eq!(later.number("version"), 3);

    let _worker = system.worker().await;
    let earlier = earlier.await.expect("no panic").expect_status(200);
    let body = earlier.json();
    assert_eq!(body["version"], 2, "{body}");
    assert!(!body["superseded_by"].is_null(), "{body}");
    system.ledger().check([Accepted::from(&earlier), Accepted::from(&later)]).await;
    assert_eq!(api.http().get_order(&order_id).await["notes"], "second");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_whose_ack_is_lost_is_found_in_the_database_at_the_deadline() {
    let _turn = alone().await;
    let system = System::new().await;
    let (api, worker) = (system.api().await, system.worker().await);
    let gate = CommitGate::install(&system.db, "order_events", "new.type = 'handled'").await;
    api.http().post_order(&order("user")).await.expect_status(201);

    gate.close().await;
    let http = api.shared_http();
    let waiting = tokio::spawn(async move { http.post_order_with(&order("user"), &[("prefer", "wait=3")]).await });
    gate.wait_for_held(1).await;
    // The commit goes through; the worker hears of it only after the deadline.
    worker.sigstop();
    gate.open().await;
    let reply = waiting.await.expect("no panic").expect_status(201);
    assert_eq!(reply.json()["order_status"], "done");
    assert!(reply.took.abs_diff(Duration::from_secs(3)) <= TOLERANCE, "ended after {:?}", reply.took);
    worker.sigcont();
    system.ledger().check([Accepted::from(&reply)]).await;
}

pub(crate) async fn waiters_become(http: &HttpClient, expected: f64) {
    wait_for(&format!("{expected} waiters"), Duration::from_secs(10), || async {
        let waiters = http.metric("orderstream_waiters").await;
        if waiters == expected { Ok(()) } else { Err(waiters.to_string()) }
    })
    .await;
}
