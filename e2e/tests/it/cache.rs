//! Orders kept in Redis: forgotten on every change, whoever makes it, and never needed.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use serde_json::{Value, json};
use test_support::{HttpClient, PrivateRedis, Proxy, System, alone, beside_others, eventually, order};
use tokio::time::Instant;

/// The versions of an order, and when their callers were told.
type Told = Mutex<Vec<(Instant, i64)>>;

/// The sum of one result's count.
async fn counted(http: &HttpClient, result: &str) -> f64 {
    http.metric(&format!("orderstream_cache_total{{result=\"{result}\"}}")).await
}

async fn with_redis(redis: &PrivateRedis, ttl: &str) -> System {
    let mut system = System::new().await;
    system.set("REDIS_ADDR", redis.address());
    system.set("CACHE_TTL", ttl);
    system
}

/// Until it is kept: nothing is for some seconds after a change.
async fn read_until_kept(http: &HttpClient, path: &str) {
    eventually(&format!("{path} is kept"), || async {
        let before = counted(http, "hit").await;
        http.get(path).await.expect_status(200);
        if counted(http, "hit").await > before { Ok(()) } else { Err("it is read from PostgreSQL".to_owned()) }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_kept_is_as_it_reads_and_forgotten_on_every_change_of_either_binary() {
    let _turn = beside_others().await;
    let redis = PrivateRedis::start().await;
    let system = with_redis(&redis, "10m").await;
    let (one, other, _worker) = (system.api().await, system.api().await, system.worker().await);
    let (plain, http) = (system.api_with(&[("REDIS_ADDR", "")]).await, one.http());
    let mut sent = order("alice");
    sent["payload"] = json!({"note": "ü 😀", "n": 1.50});
    let id = http.post_order(&sent).await.expect_status(201).text("order_id");
    let paths =
        ["/orders/{id}", "/api/orders/{id}", "/users/alice/orders", "/orders?user_id=alice", "/api/users/alice/orders"]
            .map(|path| path.replace("{id}", &id));

    // The change, and the caller's answer: made over one replica, seen over the other.
    let changes: [(&str, Value); 4] = [
        ("/orders", json!({"order_id": id, "notes": "by a client, then by the worker"})),
        ("/status", json!({"status": "processing"})),
        ("/orders", json!({"user_id": "alice", "amount": 5})),
        ("/orders", json!({"order_id": id, "status": "deleted"})),
    ];
    for (door, change) in changes {
        for path in &paths {
            read_until_kept(http, path).await;
            let (kept, stored) = (http.get(path).await, plain.http().get(path).await);
            assert_eq!(kept.body, stored.body, "{path}");
            assert_eq!(kept.headers.get("etag"), stored.headers.get("etag"), "{path}");
        }
        if door == "/status" {
            let path = format!("/orders/{id}/status");
            let headers = [("content-type", "application/json")];
            let moved = other.http().send(test_support::Method::PUT, &path, &headers, change.to_string().into()).await;
            moved.expect("an answer").expect_status(200);
        } else {
            let answer = other.http().post_order(&change).await;
            assert!(answer.is_success(), "{}", answer.summary());
        }
        for path in &paths {
            assert_eq!(http.get(path).await.body, plain.http().get(path).await.body, "{path} after {change}");
        }
    }
    assert!(counted(plain.http(), "hit").await < 1.0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_redis_that_became_a_replica_is_left_for_the_one_that_its_address_leads_to_now() {
    let _turn = beside_others().await;
    let (one, other) = (PrivateRedis::start().await, PrivateRedis::start().await);
    let address = Proxy::to(&one.address()).await;
    let mut system = with_redis(&one, "10m").await;
    system.set("REDIS_ADDR", address.address());
    let (api, _worker) = (system.api().await, system.worker().await);
    let id = api.http().post_order(&order("alice")).await.expect_status(201).text("order_id");
    let path = format!("/orders/{id}");
    read_until_kept(api.http(), &path).await;

    address.lead_to(&other.address());
    one.ask(&format!("REPLICAOF {}", other.address().replace(':', " "))).await.expect("an answer");
    // What it is asked to forget it refuses.
    eventually("the new one to be used", || async {
        let change = json!({"order_id": id, "notes": "changed"});
        api.http().post_order(&change).await.expect_status(200);
        match other.size().await {
            0 => Err("it is empty".to_owned()),
            _ => Ok(()),
        }
    })
    .await;
    read_until_kept(api.http(), &path).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_others_have_put_into_redis_is_no_answer() {
    let _turn = beside_others().await;
    let redis = PrivateRedis::start().await;
    let system = with_redis(&redis, "10m").await;
    let (api, _worker) = (system.api().await, system.worker().await);
    let http = api.http();
    let mut ids = Vec::new();
    for user in ["a", "b"] {
        ids.push(http.post_order(&order(user)).await.expect_status(201).text("order_id"));
    }
    let kinds =
        [("order", ids.as_slice(), "/orders/"), ("list", &["a".to_owned(), "b".to_owned()], "/orders?user_id=")];
    for (kind, [one, other], path) in kinds.map(|(kind, names, path)| (kind, [&names[0], &names[1]], path)) {
        let (own, foreign) = (format!("orderstream:2:{kind}:{one}"), format!("orderstream:2:{kind}:{other}"));
        let path = format!("{path}{one}");
        read_until_kept(http, &path).await;
        read_until_kept(http, &path.replace(one.as_str(), other)).await;
        let right = http.get(&path).await.expect_status(200).body;
        for command in [
            format!("COPY {foreign} {own} REPLACE"),
            format!("SET {own} garbage"),
            format!("SET {own} {}", "9".repeat(100)),
            format!("DEL {own}"),
        ] {
            redis.ask(&command).await.expect("an answer");
            assert_eq!(http.get(&path).await.expect_status(200).body, right, "after {command}");
            // It is kept anew.
            read_until_kept(http, &path).await;
        }
        // Of another kind altogether; that is nobody else's trouble.
        redis.ask(&format!("DEL {own}")).await.expect("an answer");
        redis.ask(&format!("LPUSH {own} x")).await.expect("an answer");
        assert_eq!(http.get(&path).await.expect_status(200).body, right);
    }
    assert!(api.http().metric("orderstream_cache_failures_total").await >= 1.0);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_changes_while_redis_is_full_is_forgotten_all_the_same() {
    let _turn = beside_others().await;
    let redis = PrivateRedis::start().await;
    let system = with_redis(&redis, "10m").await;
    let (one, other, _worker) = (system.api().await, system.api().await, system.worker().await);
    let id = one.http().post_order(&order("a")).await.expect_status(201).text("order_id");
    let path = format!("/orders/{id}");
    for command in ["CONFIG SET maxmemory-policy noeviction", "CONFIG SET maxmemory 0"] {
        assert_eq!(redis.ask(command).await.expect("an answer"), "+OK");
    }
    for http in [one.http(), other.http()] {
        read_until_kept(http, &path).await;
    }
    assert_eq!(redis.ask("CONFIG SET maxmemory 1").await.expect("an answer"), "+OK");
    for n in 0..5 {
        let answer = one.http().post_order(&json!({ "order_id": id, "notes": format!("note {n}") })).await;
        let version = answer.expect_status(200).number("order_version");
        for http in [one.http(), other.http()] {
            assert_eq!(http.get(&path).await.number("version"), version);
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn redis_killed_frozen_and_emptied_under_load_makes_no_error_and_no_read_older_than_its_bound() {
    const ORDERS: usize = 16;
    const BOUND: Duration = Duration::from_secs(2);
    let _turn = alone().await;
    let mut redis = PrivateRedis::start().await;
    let system = with_redis(&redis, "2s").await;
    let (one, other, _worker) = (system.api().await, system.api().await, system.worker().await);
    let clients = [Arc::new(HttpClient::new(one.http().address())), Arc::new(HttpClient::new(other.http().address()))];
    let mut ids = Vec::new();
    for _ in 0..ORDERS {
        ids.push(clients[0].post_order(&order("alice")).await.expect_status(201).text("order_id"));
    }
    // What was answered when: by then a read must not be older, but for the bound.
    let told: Arc<Vec<Told>> = Arc::new(ids.iter().map(|_| Told::default()).collect());
    let (over, reads, kept) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)), ids.clone());
    let mut tasks = tokio::task::JoinSet::new();
    for (index, id) in ids.into_iter().enumerate() {
        let (client, told, over) = (clients[index % 2].clone(), told.clone(), over.clone());
        tasks.spawn(async move {
            for n in 0.. {
                let change = json!({"order_id": id, "notes": format!("{n}")});
                let answer = client.post_order(&change).await.expect_status(200);
                told[index].lock().expect("no panic").push((Instant::now(), answer.number("order_version")));
                if over.load(Ordering::Relaxed) {
                    return;
                }
                // So that it is read several times before it changes again.
                tokio::time::sleep(Duration::from_millis(if index % 4 == 0 { 6_500 } else { 100 })).await;
            }
        });
    }
    for reader in 0..8 {
        let (client, told, over) = (clients[reader % 2].clone(), told.clone(), over.clone());
        let (ids, reads) = (kept.clone(), reads.clone());
        tasks.spawn(async move {
            for n in 0.. {
                let index = (reader + n) % ORDERS;
                let began = Instant::now();
                let read = client.get(&format!("/orders/{}", ids[index])).await.expect_status(200).number("version");
                let told = told[index].lock().expect("no panic").clone();
                let due = told.iter().filter(|(at, _)| *at + BOUND < began).map(|(_, version)| *version).max();
                assert!(due.is_none_or(|due| read >= due), "version {read} was read, {due:?} was there before");
                reads.fetch_add(1, Ordering::Relaxed);
                if over.load(Ordering::Relaxed) {
                    return;
                }
            }
        });
    }
    let hits = |least: f64| {
        let http = clients[0].clone();
        async move {
            eventually("orders are kept again", || async {
                let hits = counted(&http, "hit").await;
                if hits >= least { Ok(hits) } else { Err(format!("{hits} hits of {least}")) }
            })
            .await
        }
    };
    let failures = |least: f64| {
        let http = clients[0].clone();
        async move {
            eventually("Redis is missed", || async {
                let failures = http.metric("orderstream_cache_failures_total").await;
                if failures >= least { Ok(failures) } else { Err(format!("{failures} failures")) }
            })
            .await
        }
    };
    let mut hit = hits(50.0).await;
    for _ in 0..2 {
        let failed = clients[0].metric("orderstream_cache_failures_total").await;
        redis.kill();
        failures(failed + 2.0).await;
        redis.start_again().await;
        hit = hits(hit + 50.0).await;
        let failed = clients[0].metric("orderstream_cache_failures_total").await;
        redis.freeze();
        failures(failed + 2.0).await;
        redis.thaw();
        hit = hits(hit + 50.0).await;
        redis.flush().await;
        hit = hits(hit + 50.0).await;
    }
    over.store(true, Ordering::Relaxed);
    while let Some(ended) = tasks.join_next().await {
        ended.expect("no reader and no writer has failed");
    }
    println!("{} reads, {hit} of one replica from Redis", reads.load(Ordering::Relaxed));
}
