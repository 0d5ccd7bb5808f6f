//! Lists of orders, page by page, as clients walk them.

use std::sync::atomic::{AtomicBool, Ordering};

use bytes::Bytes;
use serde_json::{Value, json};
use test_support::{HttpClient, Method, Reply, System, beside_others, order};

async fn get_as(http: &HttpClient, path: &str, headers: &[(&str, &str)]) -> Reply {
    http.send(Method::GET, path, headers, Bytes::new()).await.unwrap_or_else(|error| panic!("GET {path}: {error:#}"))
}

fn orders_of(reply: &Reply) -> Vec<Value> {
    match reply.json() {
        Value::Array(orders) => orders,
        other => panic!("no array: {other}"),
    }
}

fn next_of(reply: &Reply) -> Option<String> {
    let link = reply.header("link")?;
    let path = link.strip_prefix('<').and_then(|rest| rest.strip_suffix(">; rel=\"next\""));
    Some(path.unwrap_or_else(|| panic!("the Link is {link}")).to_owned())
}

/// All orders of all pages from this one on.
async fn walk(http: &HttpClient, path: &str) -> Vec<Value> {
    let (mut orders, mut next) = (Vec::new(), Some(path.to_owned()));
    while let Some(path) = next {
        let reply = http.get(&path).await.expect_status(200);
        orders.extend(orders_of(&reply));
        next = next_of(&reply);
    }
    orders
}

fn ids(orders: &[Value]) -> Vec<String> {
    orders.iter().map(|order| order["order_id"].as_str().unwrap_or_default().to_owned()).collect()
}

async fn create(http: &HttpClient, order: &Value) -> String {
    http.post_order_async(order).await.expect_status(201).text("order_id")
}

#[tokio::test(flavor = "multi_thread")]
async fn a_list_shows_each_order_as_it_reads_newest_first() {
    let _turn = beside_others().await;
    let system = System::new().await;
    let (api, _worker) = (system.api().await, system.worker().await);
    let http = api.http();
    let mut created = Vec::new();
    for n in 0..7 {
        let mut order = order(if n % 2 == 0 { "even" } else { "odd" });
        order["external_id"] = json!(format!("n{n}"));
        order["lifecycle"] = json!(if n == 3 { "retail" } else { "marketplace" });
        created.push(http.post_order(&order).await.expect_status(201).text("order_id"));
    }
    http.post_order(&json!({ "order_id": created[4], "status": "deleted" })).await.expect_status(200);
    created.reverse();

    let all = http.get("/orders").await.expect_status(200);
    assert_eq!(ids(&orders_of(&all)), created);
    assert_eq!(next_of(&all), None);
    for listed in orders_of(&all) {
        assert_eq!(listed, http.get_order(listed["order_id"].as_str().unwrap_or_default()).await);
    }
    for (path, expected) in [
        ("/orders?limit=3", &created[..]),
        ("/orders?limit=7", &created[..]),
        ("/orders?user_id=even&limit=2", &[&created[0], &created[2], &created[4], &created[6]].map(Clone::clone)[..]),
        ("/users/odd/orders?limit=1", &[&created[1], &created[3], &created[5]].map(Clone::clone)[..]),
        ("/users/nobody/orders", &[]),
        ("/orders?status=deleted", &created[2..3]),
        ("/orders?status=pending&limit=1", &created[3..4]),
        ("/orders?lifecycle=retail", &created[3..4]),
        ("/orders?user_id=even&lifecycle=retail", &[]),
        ("/orders?user_id=even&status=deleted", &created[2..3]),
        ("/orders?user_id=odd&external_id=n5", &created[1..2]),
        ("/orders?user_id=even&external_id=n5", &[]),
        ("/orders?user_id=odd&external_id=n5&status=deleted", &[]),
        ("/orders?status=a%00b", &[]),
        ("/orders?user_id=odd&external_id=%00", &[]),
        ("/users/%00/orders", &[]),
        ("/orders?created_from=2100-01-01T00:00:00Z", &[]),
        ("/orders?created_to=2000-01-01T00:00:00Z", &[]),
    ] {
        assert_eq!(ids(&walk(http, path).await), expected, "{path}");
    }
    // From one order's time on, before another's.
    let at = |n: usize| orders_of(&all)[n]["created_at"].as_str().unwrap_or_default().to_owned();
    let between = format!("/orders?created_from={}&created_to={}&limit=1", at(5), at(2));
    assert_eq!(ids(&walk(http, &between).await), created[3..=5], "{between}");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_makes_no_list_is_named_and_others_orders_do_not_exist() {
    let _turn = beside_others().await;
    let system = System::new().await;
    let api = system.api().await;
    let http = api.http();
    let of_a = create(http, &json!({ "user_id": "a", "external_id": "x" })).await;
    create(http, &json!({ "user_id": "b" })).await;
    for (path, status, pointer) in [
        ("/orders?limit=0", 422, "/limit"),
        ("/orders?limit=1000", 422, "/limit"),
        ("/orders?cursor=abc", 422, "/cursor"),
        ("/orders?created_from=now", 422, "/created_from"),
        ("/orders?external_id=x", 422, "/external_id"),
        ("/orders?page=2", 400, "/page"),
        ("/orders?status=new&status=done", 400, "/status"),
        ("/users/a/orders?user_id=a", 400, "/user_id"),
    ] {
        let reply = http.get(path).await.expect_status(status);
        assert_eq!(reply.problem(), if status == 400 { "malformed" } else { "validation" });
        assert_eq!(reply.json()["errors"][0]["pointer"], pointer, "{path}: {}", reply.summary());
    }
    let as_a = [("x-user-id", "a")];
    for path in ["/orders", "/orders?user_id=a", "/orders?external_id=x", "/users/a/orders", "/orders?status=new"] {
        let reply = get_as(http, path, &as_a).await.expect_status(200);
        assert_eq!(ids(&orders_of(&reply)), [of_a.as_str()], "{path}");
    }
    for path in ["/orders?user_id=b", "/users/b/orders", "/users/nobody/orders", "/orders?user_id=b&external_id=x"] {
        let reply = get_as(http, path, &as_a).await.expect_status(404);
        assert_eq!(reply.problem(), "not-found", "{path}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn pages_show_each_order_once_while_new_ones_come() {
    let _turn = beside_others().await;
    let system = System::new().await;
    let api = system.api().await;
    let http = api.http();
    let mut before = Vec::new();
    for _ in 0..60 {
        before.push(create(http, &order("user")).await);
    }
    before.reverse();
    let done = AtomicBool::new(false);
    let insert = async {
        let mut count = 0;
        while !done.load(Ordering::Relaxed) {
            create(http, &order("user")).await;
            count += 1;
        }
        count
    };
    let read = async {
        for path in ["/orders?limit=3", "/orders?limit=7&status=new", "/users/user/orders?limit=1", "/orders?limit=200"]
        {
            let seen = ids(&walk(http, path).await);
            assert!(seen.len() >= before.len());
            // What came before the first page was read stands before them; nothing comes between.
            assert_eq!(seen[seen.len() - before.len()..], before, "{path}");
            let unique: std::collections::HashSet<_> = seen.iter().collect();
            assert_eq!(unique.len(), seen.len(), "{path}");
        }
        done.store(true, Ordering::Relaxed);
    };
    let (inserted, ()) = tokio::join!(insert, read);
    assert!(inserted > 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_order_that_the_caller_has_already_is_not_sent_again() {
    let _turn = beside_others().await;
    let system = System::new().await;
    let api = system.api().await;
    let http = api.http();
    let order_id = create(http, &json!({ "user_id": "a", "external_id": "x" })).await;
    for path in [format!("/orders/{order_id}"), "/orders/by-external/x?user_id=a".to_owned()] {
        for tag in ["\"1\"", "W/\"1\"", "\"0\", \"1\"", "\"1-gzip\"", "W/\"1-br\"", "*"] {
            let reply = get_as(http, &path, &[("if-none-match", tag)]).await.expect_status(304);
            assert_eq!((reply.header("etag"), reply.body.len()), (Some("\"1\""), 0), "{path} {tag}");
        }
        let reply = get_as(http, &path, &[("if-none-match", "\"2\"")]).await.expect_status(200);
        assert_eq!(reply.text("order_id"), order_id);
    }
}
