//! Callers that watch orders: what they see, where it ends, and how they go on elsewhere.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use serde_json::{Value, json};
use test_support::{
    Dsn, Event, EventStream, HttpClient, Method, Mode, Proxy, Reply, System, alone, beside_others, eventually, order,
    wait_for,
};
use tokio::task::JoinSet;
use tokio::time::{Instant, MissedTickBehavior, timeout};

async fn open(http: &HttpClient, order_id: &str, since: Option<&str>) -> EventStream {
    let headers: Vec<_> = since.iter().map(|since| ("last-event-id", *since)).collect();
    let path = format!("/orders/{order_id}/watch");
    let (status, headers, stream) = EventStream::open(http.address(), &path, &headers).await.expect("an answer");
    assert_eq!(status, 200, "{headers:?}");
    assert_eq!(headers.get("content-type").and_then(|value| value.to_str().ok()), Some("text/event-stream"));
    stream.expect("a stream")
}

async fn next(stream: &mut EventStream) -> Event {
    timeout(Duration::from_secs(20), stream.next()).await.expect("an event in time").expect("reads").expect("no end")
}

async fn rest(stream: EventStream) -> Vec<Event> {
    timeout(Duration::from_secs(20), stream.rest()).await.expect("an end in time").expect("reads")
}

async fn status_is(http: &HttpClient, order_id: &str, status: &str) -> Reply {
    let (path, body) = (format!("/orders/{order_id}/status"), json!({ "status": status }).to_string());
    http.send(Method::PUT, &path, &[("content-type", "application/json")], Bytes::from(body)).await.expect("an answer")
}

async fn retail(http: &HttpClient) -> String {
    let mut order = order("user");
    order["lifecycle"] = json!("retail");
    http.post_order_async(&order).await.expect_status(201).text("order_id")
}

fn ids(events: &[Event]) -> Vec<&str> {
    events.iter().map(|event| event.id.as_str()).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_watcher_sees_where_the_order_is_then_each_change_and_the_end() {
    let _turn = beside_others().await;
    let system = System::new().await;
    let (api, other) = (system.api().await, system.api().await);
    let http = api.http();
    let order_id = retail(http).await;
    let mut stream = open(other.http(), &order_id, None).await;
    let first = next(&mut stream).await;
    assert_eq!((first.id.as_str(), first.kind.as_str()), ("1", "order.created"));
    let _worker = system.worker().await;
    assert_eq!(next(&mut stream).await.id, "2");
    for status in ["confirmed", "shipped", "delivered"] {
        status_is(http, &order_id, status).await.expect_status(200);
        assert_eq!(next(&mut stream).await.data["to"], status);
    }
    assert_eq!(timeout(Duration::from_secs(5), stream.next()).await.expect("the end").expect("reads"), None);

    // All that it was told is the history, as that reads.
    let history = http.history(&order_id).await;
    let made: Vec<&Value> = history.iter().filter(|row| row["ignored"] == false).collect();
    let all = rest(open(http, &order_id, Some("0")).await).await;
    assert_eq!(all.iter().map(|event| &event.data).collect::<Vec<_>>(), made);
    assert_eq!(ids(&all), ["1", "2", "3", "4", "5"]);
    assert_eq!(ids(&rest(open(http, &order_id, Some("3")).await).await), ["4", "5"]);
    assert_eq!(ids(&rest(open(http, &order_id, None).await).await), ["5"]);
    let path = format!("/orders/{order_id}/watch?last_event_id=3");
    let (_, _, stream) = EventStream::open(http.address(), &path, &[]).await.expect("an answer");
    assert_eq!(ids(&rest(stream.expect("a stream")).await), ["4", "5"]);
    // Who knows the end need not come back.
    for query in ["5", "6"] {
        http.get(&format!("/orders/{order_id}/watch?last_event_id={query}")).await.expect_status(204);
    }
    eventually("nobody watches", || async {
        let left = api.http().metric("orderstream_watchers").await + other.http().metric("orderstream_watchers").await;
        if left == 0.0 { Ok(()) } else { Err(left.to_string()) }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_delete_ends_the_stream_and_a_final_state_that_was_left_is_gone_through() {
    let _turn = beside_others().await;
    let system = System::new().await;
    let (api, _worker) = (system.api().await, system.worker().await);
    let http = api.http();
    let broken = json!({ "user_id": "user", "payload": { "amount": 1, "currency": "XQZ" } });
    let order_id = http.post_order(&broken).await.expect_status(422).text("order_id");
    let mended = json!({ "order_id": order_id, "payload": { "amount": 1, "currency": "EUR" } });
    http.post_order(&mended).await.expect_status(200);
    http.send(Method::POST, &format!("/orders/{order_id}/cancel"), &[], Bytes::new())
        .await
        .expect("an answer")
        .expect_status(200);
    // new, rejected; new, done, cancelled: whoever comes now is told all of it.
    assert_eq!(ids(&rest(open(http, &order_id, Some("0")).await).await), ["1", "2", "3", "4", "5"]);
    assert_eq!(ids(&rest(open(http, &order_id, Some("2")).await).await), ["3", "4", "5"]);
    http.post_order(&json!({ "order_id": order_id, "status": "deleted" })).await.expect_status(200);
    let last = rest(open(http, &order_id, None).await).await;
    assert_eq!((last.len(), &last[0].data["to"], last[0].kind.as_str()), (1, &json!("deleted"), "order.deleted"));
}

#[tokio::test(flavor = "multi_thread")]
async fn who_may_not_watch_is_told_why() {
    let _turn = beside_others().await;
    let system = System::new().await;
    let api = system.api_with(&[("MAX_WATCHERS", "2")]).await;
    let http = api.http();
    let order_id = retail(http).await;
    let path = format!("/orders/{order_id}/watch");
    for bad in ["-1", "x", "9999999999999999999", "1.0", "%00"] {
        let reply = http.get(&format!("{path}?last_event_id={bad}")).await.expect_status(422);
        assert_eq!(reply.json()["errors"][0]["pointer"], "/last_event_id");
    }
    http.get("/orders/01a1f940-5d67-71df-a13f-3c8b3232e538/watch").await.expect_status(404);
    http.get("/orders/none/watch").await.expect_status(400);
    let (status, _, _) = EventStream::open(http.address(), &path, &[("x-user-id", "b")]).await.expect("an answer");
    assert_eq!(status, 404);

    let first = open(http, &order_id, None).await;
    let _second = open(http, &order_id, None).await;
    let third = http.get(&path).await.expect_status(503);
    assert!(third.header("retry-after").is_some(), "{}", third.summary());
    drop(first);
    eventually("a place", || async {
        let (status, _, _) = EventStream::open(http.address(), &path, &[]).await.map_err(|error| error.to_string())?;
        if status == 200 { Ok(()) } else { Err(status.to_string()) }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn streams_end_at_once_when_the_process_stops() {
    let _turn = beside_others().await;
    let system = System::new().await;
    let api = system.api_with(&[("SHUTDOWN_GRACE_MS", "0")]).await;
    let order_id = retail(api.http()).await;
    let mut streams = Vec::new();
    for _ in 0..20 {
        let mut stream = open(api.http(), &order_id, None).await;
        next(&mut stream).await;
        streams.push(stream);
    }
    let began = Instant::now();
    api.sigterm();
    for stream in streams {
        assert_eq!(rest(stream).await, []);
    }
    assert!(api.exit_within(Duration::from_secs(10)).await.success());
    assert!(began.elapsed() < Duration::from_secs(5), "it took {:?}", began.elapsed());
}

#[tokio::test(flavor = "multi_thread")]
async fn streams_stay_open_while_the_database_is_away() {
    let _turn = beside_others().await;
    let system = System::new().await;
    let proxy = Proxy::to(&Dsn::from_env().address()).await;
    let dsn = system.db.dsn().with_address(&proxy.address()).to_string();
    let (api, other) = (system.api_with(&[("POSTGRES_DSN", &dsn)]).await, system.api().await);
    let order_id = retail(other.http()).await;
    let mut stream = open(api.http(), &order_id, None).await;
    assert_eq!(next(&mut stream).await.id, "1");
    proxy.set(Mode::Cut);
    status_is(other.http(), &order_id, "confirmed").await.expect_status(200);
    wait_for("the outage to be seen", Duration::from_secs(20), || async {
        if api.log().contains("those who watch") { Ok(()) } else { Err(api.log()) }
    })
    .await;
    proxy.restore();
    assert_eq!(next(&mut stream).await.data["to"], "confirmed");
    status_is(other.http(), &order_id, "cancelled").await.expect_status(200);
    assert_eq!(ids(&rest(stream).await), ["3"]);
}

/// One that watches an order to its end, wherever that can be seen.
struct Watcher {
    order_id: String,
    seen: Vec<Event>,
    delays: Vec<(Duration, bool)>,
    resumed: bool,
}

impl Watcher {
    async fn run(mut self, replicas: Arc<[Arc<HttpClient>; 2]>, mut at: usize, opened: Arc<AtomicU64>) -> Self {
        loop {
            let path = format!("/orders/{}/watch", self.order_id);
            let last = self.seen.last().map(|event| event.id.clone());
            let headers: Vec<_> = last.iter().map(|last| ("last-event-id", last.as_str())).collect();
            match EventStream::open(replicas[at].address(), &path, &headers).await {
                Ok((204, ..)) => return self,
                Ok((200, _, Some(mut stream))) => {
                    opened.fetch_add(1, Ordering::Relaxed);
                    while let Ok(Some(event)) = stream.next().await {
                        self.note(event);
                    }
                    if self.seen.last().is_some_and(|event| event.data["to"] == "cancelled") {
                        return self;
                    }
                }
                Ok((503, ..)) | Err(_) => tokio::time::sleep(Duration::from_millis(50)).await,
                other => panic!("watching was answered {other:?}"),
            }
            (at, self.resumed) = (1 - at, true);
        }
    }

    fn note(&mut self, event: Event) {
        let at = event.data["at"].as_str().unwrap_or_default().to_owned();
        self.delays.push((since(&at), self.resumed));
        self.seen.push(event);
    }
}

/// How long ago that was: the tests run where the service does, with one clock.
fn since(at: &str) -> Duration {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).expect("after 1970");
    // The seconds of the day are enough: 2026-11-25T15:35:25.123456Z
    let time = at.split_once('T').map(|(_, time)| time.trim_end_matches('Z')).unwrap_or_default();
    let parts: Vec<f64> = time.split(':').map(|part| part.parse().expect(at)).collect();
    let then = parts[0] * 3600.0 + parts[1] * 60.0 + parts[2];
    let now = now.as_secs_f64() % 86_400.0;
    Duration::from_secs_f64((now - then).rem_euclid(86_400.0))
}

fn percentile(delays: &mut [Duration], percent: usize) -> Duration {
    delays.sort_unstable();
    delays[(delays.len() * percent / 100).min(delays.len() - 1)]
}

#[tokio::test(flavor = "multi_thread")]
async fn a_thousand_watchers_on_two_replicas_see_each_change_once_and_in_order_though_one_dies() {
    const WATCHERS: usize = 1_000;
    const PER_SECOND: u32 = 100;
    let _turn = alone().await;
    let system = System::new().await;
    let (staying, dying) = (system.api().await, system.api().await);
    let _worker = system.worker().await;
    let mut orders = Vec::new();
    for _ in 0..WATCHERS {
        orders.push(retail(staying.http()).await);
    }
    let replicas = Arc::new([staying.shared_http(), dying.shared_http()]);
    let opened = Arc::new(AtomicU64::new(0));
    let mut watchers = JoinSet::new();
    for (turn, order_id) in orders.iter().enumerate() {
        let watcher = Watcher { order_id: order_id.clone(), seen: Vec::new(), delays: Vec::new(), resumed: false };
        watchers.spawn(watcher.run(Arc::clone(&replicas), turn % 2, Arc::clone(&opened)));
    }
    wait_for("all to watch", Duration::from_secs(30), || async {
        let opened = opened.load(Ordering::Relaxed);
        if opened == WATCHERS as u64 { Ok(()) } else { Err(format!("{opened} watch")) }
    })
    .await;
    // The worker's own step is behind them all, so that what follows comes at the pace of this test.
    system.ledger().settle().await;

    let began = SystemTime::now();
    let mut pace = tokio::time::interval(Duration::from_secs(1) / PER_SECOND);
    pace.set_missed_tick_behavior(MissedTickBehavior::Burst);
    let mut changes = JoinSet::new();
    let moves = ["confirmed", "cancelled"].into_iter().flat_map(|to| orders.iter().map(move |order_id| (order_id, to)));
    let started = Instant::now();
    for (count, (order_id, to)) in moves.enumerate() {
        pace.tick().await;
        // Halfway through the second round, when some have nothing more to see there.
        if count == WATCHERS + WATCHERS / 2 {
            dying.kill9();
        }
        let (http, order_id) = (staying.shared_http(), order_id.clone());
        changes.spawn(async move { status_is(&http, &order_id, to).await.expect_status(200) });
    }
    changes.join_all().await;
    let rate = (2 * WATCHERS) as f64 / started.elapsed().as_secs_f64();

    let ended = Mutex::new(Vec::new());
    let all_end = async {
        while let Some(watcher) = watchers.join_next().await {
            ended.lock().expect("never poisoned").push(watcher.expect("no panic"));
        }
    };
    if timeout(Duration::from_secs(30), all_end).await.is_err() {
        panic!("{} of {WATCHERS} watchers saw the end", ended.lock().expect("never poisoned").len());
    }
    let (mut live, mut resumed) = (Vec::new(), Vec::new());
    for watcher in ended.into_inner().expect("never poisoned") {
        let versions: Vec<i64> = watcher.seen.iter().map(|event| event.id.parse().expect("a version")).collect();
        assert!(versions.windows(2).all(|pair| pair[1] == pair[0] + 1), "{}: {versions:?}", watcher.order_id);
        assert!(versions[0] <= 2 && versions.ends_with(&[3, 4]), "{}: {versions:?}", watcher.order_id);
        let states: Vec<_> = watcher.seen.iter().skip(1).map(|event| &event.data["from"]).collect();
        let before: Vec<_> = watcher.seen.iter().map(|event| &event.data["to"]).take(states.len()).collect();
        assert_eq!(states, before);
        let age = began.elapsed().expect("time goes on");
        for (delay, is_resumed) in watcher.delays.iter().skip(versions.len() - 2) {
            assert!(*delay < age, "{delay:?}");
            if *is_resumed { resumed.push(*delay) } else { live.push(*delay) }
        }
    }
    let told = staying.http().metric("orderstream_watch_delay_seconds_count").await;
    eprintln!(
        "{WATCHERS} watchers, {rate:.0} changes/s: {} seen live, delay p50 {:?}, p99 {:?}; {} seen after a replica died, \
         p50 {:?}, p99 {:?}; {told} told by the other",
        live.len(),
        percentile(&mut live, 50),
        percentile(&mut live, 99),
        resumed.len(),
        percentile(&mut resumed, 50),
        percentile(&mut resumed, 99),
    );
    // Milliseconds on a machine that does nothing else; this is for one that does.
    assert!(percentile(&mut live, 99) < Duration::from_secs(5), "they hear late");
    assert_eq!(live.len() + resumed.len(), 2 * WATCHERS);
    staying.assert_healthy().await;
}

/// As a page in a browser does: by the URL alone. `None` where that is refused.
async fn open_with(http: &HttpClient, order_id: &str, ticket: &str, since: i64) -> Result<EventStream, u16> {
    let path = format!("/orders/{order_id}/watch?ticket={ticket}&last_event_id={since}");
    let (status, _, stream) = EventStream::open(http.address(), &path, &[]).await.expect("an answer");
    stream.ok_or(status)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_page_watches_one_order_with_a_ticket_at_any_replica() {
    let _turn = beside_others().await;
    let system = System::new().await;
    let settings = [("AUTH_MODE", "header"), ("LOG_LEVEL", "trace"), ("CORS_ALLOWED_ORIGINS", "https://shop.example")];
    let (api, other) = (system.api_with(&settings).await, system.api_with(&settings).await);
    let http = api.http();
    let ask = async |method: Method, path: &str, user: &str, body: Value| {
        let headers = [("x-user-id", user), ("content-type", "application/json"), ("prefer", "respond-async")];
        http.send(method, path, &headers, body.to_string().into()).await.expect("an answer")
    };
    let mut made = Vec::new();
    for _ in 0..2 {
        let order = ask(Method::POST, "/orders", "user", order("user")).await.expect_status(201);
        made.push(order.text("order_id"));
    }
    let [order_id, another] = [&made[0], &made[1]];
    let give = async |order_id: &str, user: &str| {
        ask(Method::POST, &format!("/orders/{order_id}/watch-ticket"), user, Value::Null).await
    };
    let given = give(order_id, "user").await.expect_status(200);
    assert_eq!(given.header("cache-control"), Some("no-store"), "{}", given.summary());
    assert!(given.json()["expires_at"].as_str().is_some_and(|at| at.ends_with('Z')), "{}", given.summary());
    let ticket = given.text("ticket");
    // Of somebody else's order there is none, and without a name there are none.
    give(order_id, "thief").await.expect_status(404);
    let nameless = http.send(Method::POST, &format!("/orders/{order_id}/watch-ticket"), &[], "".into()).await;
    nameless.expect("an answer").expect_status(401);

    // Here and elsewhere; an EventSource that comes back does so to the same URL.
    for replica in [http, other.http()] {
        let mut stream = open_with(replica, order_id, &ticket, 0).await.expect("a stream");
        assert_eq!(next(&mut stream).await.id, "1");
    }
    let origin = [("origin", "https://shop.example")];
    let path = format!("/orders/{order_id}/watch?ticket={ticket}&last_event_id=0");
    let (_, headers, _) = EventStream::open(http.address(), &path, &origin).await.expect("an answer");
    assert_eq!(headers.get("access-control-allow-origin").map(|value| value.as_bytes()), Some(origin[0].1.as_bytes()));

    // For this order and for watching it alone; and nothing that looks like one.
    let [head, claims, signature] = ticket.split('.').collect::<Vec<_>>()[..] else { panic!("{ticket}") };
    let of_another = give(another, "user").await.expect_status(200).text("ticket");
    let swapped = format!("{head}.{}.{signature}", of_another.split('.').nth(1).expect("claims"));
    let unsigned = format!("{head}.{claims}.");
    for (order_id, ticket) in [
        (another, &ticket),
        (order_id, &of_another),
        (order_id, &swapped),
        (order_id, &unsigned),
        (order_id, &"x".to_owned()),
        (order_id, &String::new()),
    ] {
        assert_eq!(open_with(http, order_id, ticket, 0).await.err(), Some(401), "{order_id} {ticket}");
    }
    let bearer = format!("Bearer {ticket}");
    for (path, headers) in [
        (format!("/orders/{order_id}?ticket={ticket}"), vec![]),
        (format!("/orders?ticket={ticket}"), vec![]),
        (format!("/orders/{order_id}/watch"), vec![("authorization", bearer.as_str())]),
    ] {
        http.send(Method::GET, &path, &headers, "".into()).await.expect("an answer").expect_status(401);
    }
    let twice = format!("/orders/{order_id}/watch?ticket={ticket}&ticket={ticket}");
    assert_eq!(http.get(&twice).await.expect_status(400).json()["errors"][0]["pointer"], "/ticket");

    // With a new key the old tickets stay good until the old key goes.
    system.db.execute("insert into ticket_keys default values").await;
    open_with(other.http(), order_id, &ticket, 0).await.expect("a stream");
    system.db.execute("delete from ticket_keys where created_at < (select max(created_at) from ticket_keys)").await;
    let third = system.api_with(&settings).await;
    assert_eq!(open_with(third.http(), order_id, &ticket, 0).await.err(), Some(401));
    let path = format!("/orders/{order_id}/watch-ticket");
    let renewed = third.http().send(Method::POST, &path, &[("x-user-id", "user")], "".into()).await;
    let renewed = renewed.expect("an answer").expect_status(200).text("ticket");
    eventually("a replica that knew the old key to take the new one", || async {
        open_with(http, order_id, &renewed, 0).await.map(drop).map_err(|status| status.to_string())
    })
    .await;

    // Whoever reads the log watches nothing with it.
    for log in [api.log(), other.log()] {
        assert!(!log.contains(&ticket) && !log.contains(signature), "a ticket in the log");
    }
}
