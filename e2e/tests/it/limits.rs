//! What is the same for all of HTTP: how often callers may ask, which pages may call, and what is
//! said with every answer.

use bytes::Bytes;
use futures_util::future::join_all;
use serde_json::{Value, json};
use test_support::{
    Accepted, Api, CommitGate, HttpClient, Method, Reply, System, beside_few, beside_others, eventually, order,
};
use tokio::task::JoinSet;
use tonic::Code;

use crate::grpc::{channel, proto::orders::service::v1::orders_service_client::OrdersServiceClient, upsert, with};

async fn send(http: &HttpClient, method: Method, path: &str, headers: &[(&str, &str)]) -> Reply {
    let reply = http.send(method.clone(), path, headers, Bytes::new()).await;
    reply.unwrap_or_else(|error| panic!("{method} {path}: {error:#}"))
}

#[tokio::test(flavor = "multi_thread")]
async fn who_asks_too_often_is_told_when_to_ask_again_and_keeps_nobody_else_from_asking() {
    let _turn = beside_others().await;
    let system = System::new().await;
    let api = system.api_with(&[("RATE_LIMIT", "1"), ("RATE_LIMIT_BURST", "10")]).await;
    let http = api.http();
    let nowhere = "/orders/0198f2a0-0000-7000-8000-000000000001";
    let ask = async |path: &str, user: &str| send(http, Method::GET, path, &[("x-user-id", user)]).await;

    let replies = join_all((0..40).map(|_| ask(nowhere, "busy"))).await;
    let refused: Vec<&Reply> = replies.iter().filter(|reply| reply.status == 429).collect();
    // A second or some may have passed.
    assert!((20..=30).contains(&refused.len()), "{} of 40 were refused", refused.len());
    for reply in &refused {
        assert_eq!(reply.problem(), "rate-limited");
        assert_eq!(reply.header("retry-after"), Some("1"), "{}", reply.summary());
        assert!(
            reply.header("ratelimit").is_some_and(|told| told.starts_with("\"default\";r=0;t=")),
            "{}",
            reply.summary()
        );
    }
    for reply in &replies {
        assert_eq!(reply.header("ratelimit-policy"), Some("\"default\";q=10;w=10"), "{}", reply.summary());
        assert!([404, 429].contains(&reply.status), "{}", reply.summary());
    }
    let enveloped = ask("/api/orders", "busy").await;
    if enveloped.status == 429 {
        assert_eq!(enveloped.text("status"), "error");
        assert!(enveloped.header("retry-after").is_some(), "{}", enveloped.summary());
    }
    // Others, and those who look after the service.
    let other = ask(nowhere, "other").await.expect_status(404);
    assert_eq!(other.header("ratelimit"), Some("\"default\";r=9;t=1"), "{}", other.summary());
    // Who says no name is known by its address.
    send(http, Method::GET, nowhere, &[]).await.expect_status(404);
    for path in ["/health", "/ready", "/metrics"] {
        for _ in 0..15 {
            assert!(ask(path, "busy").await.expect_status(200).header("ratelimit").is_none(), "{path}");
        }
    }
    eventually("another request to be allowed", || async {
        let reply = ask(nowhere, "busy").await;
        if reply.status == 404 { Ok(()) } else { Err(reply.summary()) }
    })
    .await;
    assert!(http.metric("orderstream_requests_refused_total").await >= 20.0);
}

#[tokio::test(flavor = "multi_thread")]
async fn callers_behind_a_trusted_proxy_are_apart_and_nobody_is_whom_he_says_himself() {
    let _turn = beside_others().await;
    let system = System::new().await;
    // On a socket of both families, where an address of IPv4 comes in as one of IPv6.
    let limits = [("RATE_LIMIT", "1"), ("RATE_LIMIT_BURST", "10"), ("API_PORT", "0")];
    let behind = system.api_with(&[&limits[..], &[("TRUSTED_PROXIES", "127.0.0.0/8, 10.0.0.0/8")]].concat()).await;
    let alone = system.api_with(&limits).await;
    let over_ipv4 =
        |api: &Api| HttpClient::new(format!("127.0.0.1:{}", api.http().address().rsplit(':').next().unwrap()));
    let (proxied, direct) = (over_ipv4(&behind), over_ipv4(&alone));
    let path = "/orders/0198f2a0-0000-7000-8000-000000000001";
    let refused = async |http: &HttpClient, name: &str, value: &(dyn Fn(usize) -> String + Sync)| {
        let replies =
            join_all((0..30).map(|n| async move { send(http, Method::GET, path, &[(name, &value(n))]).await }));
        replies.await.iter().filter(|reply| reply.status == 429).count()
    };
    let (xff, forwarded) = ("x-forwarded-for", "forwarded");
    // One behind it, whatever that one writes itself; a second or some may pass.
    let spoofed = refused(&proxied, xff, &|n| format!("192.0.2.{n}, 198.51.100.1, 10.1.1.1")).await;
    assert!((10..=20).contains(&spoofed), "{spoofed}");
    let spoofed =
        refused(&proxied, forwarded, &|n| format!("for=192.0.2.{n}, for=\"198.51.100.2:{n}\";proto=https")).await;
    assert!((10..=20).contains(&spoofed), "{spoofed}");
    // Who is another is another; what makes no sense is the proxy's own.
    assert_eq!(refused(&proxied, xff, &|n| format!("203.0.113.{n}")).await, 0);
    assert_eq!(refused(&proxied, forwarded, &|n| format!("for=\"[2001:db8:{n}::1]\"")).await, 0);
    let nonsense = refused(&proxied, xff, &|n| format!("203.0.113.{n}, unknown")).await;
    assert!((10..=20).contains(&nonsense), "{nonsense}");
    // Nobody else is believed.
    let untrusted = refused(&direct, xff, &|n| format!("203.0.113.{n}")).await;
    assert!((10..=20).contains(&untrusted), "{untrusted}");

    // Over gRPC it is the same caller.
    let of = |caller: &str| with(upsert("", "user", "", &Value::Null), &[(xff, caller)]);
    let orders = OrdersServiceClient::new(channel(&behind));
    let ask = |caller: String| {
        let (mut orders, request) = (orders.clone(), of(&caller));
        async move { orders.upsert_order(request).await.err().map(|status| status.code()) }
    };
    let said = join_all((0..30).map(|_| ask("198.51.100.3".to_owned()))).await;
    assert!(said.iter().filter(|code| **code == Some(Code::ResourceExhausted)).count() >= 10, "{said:?}");
    let said = join_all((0..30).map(|n| ask(format!("198.51.100.1{n:02}")))).await;
    assert!(!said.contains(&Some(Code::ResourceExhausted)), "{said:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn behind_a_gateway_that_takes_a_prefix_away_what_is_told_leads_on() {
    let _turn = beside_others().await;
    let system = System::new().await;
    let settings = [("TRUSTED_PROXIES", "127.0.0.1"), ("PUBLIC_PATH", "/own"), ("ACK_WAIT_MS", "10")];
    let api = system.api_with(&settings).await;
    let http = api.http();
    let sent = serde_json::to_vec(&order("user")).expect("JSON");
    for (headers, prefix) in [
        (&[("x-forwarded-prefix", "/shop-api")][..], "/shop-api"),
        (&[("x-forwarded-prefix", "/shop, /api/")], "/shop/api"),
        (&[("x-forwarded-prefix", "//elsewhere")], "/own"),
        (&[], "/own"),
    ] {
        let leads_on = async |told: &str| {
            let path = told.strip_prefix(prefix).unwrap_or_else(|| panic!("{told} is not behind {prefix}"));
            send(http, Method::GET, path, headers).await.expect_status(200)
        };
        for (path, prefer, status) in
            [("/orders", "wait=1", 202), ("/orders", "respond-async", 201), ("/api/orders", "respond-async", 201)]
        {
            let all = [headers, &[("prefer", prefer), ("content-type", "application/json")]].concat();
            let reply = http.send(Method::POST, path, &all, sent.clone().into()).await.expect("an answer");
            leads_on(reply.expect_status(status).header("location").expect("a location")).await;
        }
        for list in ["/orders?user_id=user&limit=1", "/users/user/orders?limit=2"] {
            let page = send(http, Method::GET, list, headers).await.expect_status(200);
            let (link, _) =
                page.header("link").and_then(|link| link.strip_prefix('<')?.split_once('>')).expect("a link");
            leads_on(link).await;
        }
        // Those are relative.
        let document = send(http, Method::GET, "/openapi.json", headers).await.expect_status(200);
        assert_eq!(document.json()["servers"][0]["url"], ".");
        assert_eq!(send(http, Method::GET, "/docs", headers).await.header("location"), Some("docs/"));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_order_beyond_the_rate_is_not_stored() {
    let _turn = beside_others().await;
    let system = System::new().await;
    let api = system.api_with(&[("RATE_LIMIT", "1"), ("RATE_LIMIT_BURST", "5"), ("AUTH_MODE", "header")]).await;
    let user = [("x-user-id", "user"), ("prefer", "respond-async")];
    let sent = order("user");
    let replies = join_all((0..20).map(|_| api.http().post_order_with(&sent, &user))).await;
    let stored = replies.iter().filter(|reply| reply.status == 201).count();
    assert!((5..20).contains(&stored), "{stored} were stored");
    assert!(replies.iter().all(|reply| [201, 429].contains(&reply.status)));
    let count = system.db.number("select count(*) from orders", &[]).await;
    assert_eq!(usize::try_from(count).expect("a count"), stored);
}

#[tokio::test(flavor = "multi_thread")]
async fn every_answer_says_that_it_is_data_for_its_caller_alone() {
    let _turn = beside_others().await;
    let system = System::new().await;
    let api = system.api().await;
    let stored = api.http().post_order_async(&order("user")).await.expect_status(201);
    let one = format!("/orders/{}", stored.text("order_id"));
    let http = api.http();
    let admin = api.admin();
    let replies = [
        stored,
        send(http, Method::GET, &one, &[]).await.expect_status(200),
        send(http, Method::GET, "/api/orders", &[]).await.expect_status(200),
        send(http, Method::GET, "/orders/17", &[]).await.expect_status(400),
        send(http, Method::GET, "/nothing", &[]).await.expect_status(404),
        send(http, Method::DELETE, "/orders", &[]).await.expect_status(405),
        send(http, Method::GET, "/health", &[]).await.expect_status(200),
        send(http, Method::GET, "/metrics", &[]).await.expect_status(200),
        send(&admin, Method::GET, "/admin/parked", &[]).await.expect_status(200),
        send(&admin, Method::GET, "/admin/nothing", &[]).await.expect_status(404),
    ];
    for reply in &replies {
        for (name, value) in [
            ("x-content-type-options", "nosniff"),
            ("referrer-policy", "no-referrer"),
            ("cache-control", "no-store"),
            ("content-security-policy", "default-src 'none'; frame-ancestors 'none'"),
        ] {
            assert_eq!(reply.header(name), Some(value), "{name} in {}", reply.summary());
        }
        // What nobody has asked for.
        for name in ["access-control-allow-origin", "ratelimit", "ratelimit-policy"] {
            assert!(reply.header(name).is_none(), "{name} in {}", reply.summary());
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn pages_of_allowed_origins_may_call_and_no_others() {
    let _turn = beside_others().await;
    let system = System::new().await;
    let (shop, other) = ("https://shop.example", "https://elsewhere.example");
    let api = system
        .api_with(&[("CORS_ALLOWED_ORIGINS", "https://shop.example, http://localhost:3000"), ("AUTH_MODE", "header")])
        .await;
    let http = api.http();
    let asked_of = async |http: &HttpClient, path: &str, origin: &str, names: &str| {
        let headers =
            [("origin", origin), ("access-control-request-method", "POST"), ("access-control-request-headers", names)];
        send(http, Method::OPTIONS, path, &headers).await
    };
    let preflight = async |path: &str, origin: &str| asked_of(http, path, origin, "content-type,idempotency-key").await;
    let allowed = |reply: &Reply| -> Vec<String> {
        let names = reply.header("access-control-allow-headers").unwrap_or_default().split(',');
        names.map(|name| name.trim().to_ascii_lowercase()).collect()
    };
    // Before it says who it is: browsers send no identity with this question.
    for path in ["/orders", "/api/orders", "/orders/0198f2a0-0000-7000-8000-000000000001/cancel"] {
        let reply = preflight(path, shop).await.expect_status(200);
        assert_eq!(reply.header("access-control-allow-origin"), Some(shop), "{}", reply.summary());
        for (name, part) in [
            ("access-control-allow-methods", "POST"),
            ("access-control-allow-headers", "idempotency-key"),
            ("access-control-allow-headers", "authorization"),
            ("access-control-max-age", "600"),
        ] {
            assert!(reply.header(name).is_some_and(|value| value.contains(part)), "{part}: {}", reply.summary());
        }
        assert!(reply.header("access-control-allow-credentials").is_none(), "{}", reply.summary());
        let reply = preflight(path, other).await;
        assert!(reply.header("access-control-allow-origin").is_none(), "{}", reply.summary());
    }
    // The answers themselves, refusals too.
    let path = "/orders/0198f2a0-0000-7000-8000-000000000001";
    for (headers, status) in [(vec![("origin", shop)], 401), (vec![("origin", shop), ("x-user-id", "user")], 404)] {
        let reply = send(http, Method::GET, path, &headers).await.expect_status(status);
        assert_eq!(reply.header("access-control-allow-origin"), Some(shop), "{}", reply.summary());
        let shown = reply.header("access-control-expose-headers").unwrap_or_default();
        for name in [
            "location",
            "etag",
            "link",
            "retry-after",
            "preference-applied",
            "x-request-id",
            "idempotency-replayed",
            "ratelimit",
            "ratelimit-policy",
            "www-authenticate",
            "allow",
        ] {
            assert!(shown.split(',').any(|one| one.trim() == name), "{name} in {shown}");
        }
    }
    let reply = send(http, Method::GET, path, &[("origin", other), ("x-user-id", "user")]).await.expect_status(404);
    assert!(reply.header("access-control-allow-origin").is_none(), "{}", reply.summary());

    // All that the API reads, and what tracing in browsers adds.
    let names = allowed(&preflight("/orders", shop).await);
    for name in [
        "authorization",
        "content-type",
        "idempotency-key",
        "if-match",
        "if-none-match",
        "prefer",
        "x-user-id",
        "x-user-role",
        "x-request-id",
        "last-event-id",
        "traceparent",
        "tracestate",
        "baggage",
        "sentry-trace",
        "b3",
        "x-datadog-trace-id",
        "newrelic",
        "elastic-apm-traceparent",
        "x-requested-with",
    ] {
        assert!(names.iter().any(|allowed| allowed == name), "{name} in {names:?}");
    }
    let own = [("CORS_ALLOWED_ORIGINS", shop), ("CORS_ALLOWED_HEADERS", " X-Ours,\n x-theirs ")];
    let own = system.api_with(&own).await;
    let names = allowed(&asked_of(own.http(), "/orders", shop, "x-ours").await.expect_status(200));
    for (name, is_allowed) in [("x-ours", true), ("x-theirs", true), ("authorization", true), ("baggage", false)] {
        assert_eq!(names.iter().any(|allowed| allowed == name), is_allowed, "{name} in {names:?}");
    }

    let open = system.api_with(&[("CORS_ALLOWED_ORIGINS", "*"), ("CORS_ALLOWED_HEADERS", "*")]).await;
    let names = allowed(&asked_of(open.http(), "/orders", other, "authorization,x-any").await.expect_status(200));
    assert_eq!(names, ["authorization", "x-any"]);
    let reply = send(open.http(), Method::GET, path, &[("origin", other)]).await.expect_status(404);
    assert_eq!(reply.header("access-control-allow-origin"), Some("*"), "{}", reply.summary());
    // Where nobody has allowed it, it is no question that is answered.
    let closed = system.api().await;
    let headers = [("origin", shop), ("access-control-request-method", "POST")];
    let reply = send(closed.http(), Method::OPTIONS, "/orders", &headers).await.expect_status(405);
    assert!(reply.header("access-control-allow-origin").is_none(), "{}", reply.summary());
}

#[tokio::test(flavor = "multi_thread")]
async fn headers_without_measure_are_refused() {
    let _turn = beside_others().await;
    let system = System::new().await;
    let api = system.api().await;
    let many: String = (0..1_000).map(|n| format!("x-{n}: y\r\n")).collect();
    for headers in [many, format!("x: {}\r\n", "y".repeat(200_000))] {
        let request = format!("GET /health HTTP/1.1\r\nhost: x\r\n{headers}\r\n");
        let reply = api.http().send_raw(request.as_bytes()).await.expect("an answer");
        assert_eq!(reply.status, 431, "{}", reply.summary());
    }
    api.assert_healthy().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn when_new_orders_find_no_place_they_are_refused_at_once_and_changes_are_not() {
    /// What one connection of gRPC has under way; of these so many are more than may wait.
    const STREAMS: usize = 1000;
    const CONNECTIONS: usize = 6;
    let _turn = beside_few().await;
    let mut system = System::new().await;
    system.set("DB_WRITE_TIMEOUT", "60s");
    let api = system.api().await;
    let http = api.http();
    let known = http.post_order_async(&order("user")).await.expect_status(201);
    let gate = CommitGate::install(&system.db, "order_events", "new.type = 'order.created'").await;
    gate.close().await;

    let mut waiting = JoinSet::new();
    for _ in 0..CONNECTIONS {
        let orders = OrdersServiceClient::new(channel(&api));
        for n in 0..STREAMS {
            let mut orders = orders.clone();
            let new = with(upsert("", &format!("user-{n}"), "", &Value::Null), &[("prefer", "respond-async")]);
            waiting.spawn(async move { orders.upsert_order(new).await });
        }
    }
    // Whoever is answered while the gate is closed is refused.
    let refused = waiting.join_next().await.expect("one of them").expect("no panic").expect_err("no place");
    assert_eq!(refused.code(), Code::Unavailable, "{refused:?}");
    let new = order("user");
    let named = json!({ "order_id": null, "user_id": "user" });
    for new in [&new, &named] {
        let refused = http.post_order_async(new).await.expect_status(503);
        assert_eq!(refused.problem(), "unavailable");
        assert!(refused.header("retry-after").is_some(), "{}", refused.summary());
    }
    let change = json!({ "order_id": known.text("order_id"), "notes": "changed" });
    let changed = http.post_order_async(&change).await.expect_status(200);
    assert_eq!(changed.number("version"), 2);

    gate.open().await;
    let mut accepted = vec![Accepted::from(&known), Accepted::from(&changed)];
    let mut stored = 1;
    while let Some(ended) = waiting.join_next().await {
        match ended.expect("no panic") {
            Ok(_) => stored += 1,
            Err(refused) => assert_eq!(refused.code(), Code::Unavailable, "{refused:?}"),
        }
    }
    assert_eq!(system.db.number("select count(*) from orders", &[]).await, stored);
    accepted.push(Accepted::from(&http.post_order_async(&new).await.expect_status(201)));
    let _worker = system.worker().await;
    system.ledger().check(accepted).await;
}
