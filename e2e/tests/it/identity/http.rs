//! Each route of HTTP.

use serde_json::json;
use test_support::{Api, Reply, System, beside_others, order};

use super::{Caller, JWT, bad_tokens, bearer, by_header, by_token, claims, pretender, signed};

/// Every route, and how it answers somebody else than the owner of the order that it names.
/// What is in braces is the owner's.
const ROUTES: &[(&str, &str, &str, u16)] = &[
    ("POST", "/orders", r#"{"user_id":"{user}"}"#, 422),
    ("POST", "/orders", r#"{"order_id":"{id}","notes":"mine now"}"#, 404),
    ("POST", "/orders", r#"{"order_id":"{id}","status":"deleted"}"#, 404),
    ("POST", "/orders", r#"{"order_id":"{id}","user_id":"{user}","notes":"mine now"}"#, 422),
    // Here it is a line of the answer that is 404.
    ("POST", "/orders/bulk", r#"{"order_id":"{id}","notes":"mine now"}"#, 200),
    ("POST", "/orders/bulk?policy=reject-all", r#"{"user_id":"{user}"}"#, 422),
    ("GET", "/orders/by-external/{external}?user_id={user}", "", 404),
    ("GET", "/orders/by-external/{external}", "", 404),
    ("GET", "/orders/{order_id}", "", 404),
    ("GET", "/orders/{order_id}/history", "", 404),
    ("GET", "/orders/{order_id}/requests/{correlation_id}", "", 404),
    ("GET", "/orders/{order_id}/watch", "", 404),
    ("POST", "/orders/{order_id}/watch-ticket", "", 404),
    ("GET", "/orders?user_id={user}", "", 404),
    ("GET", "/orders?user_id={user}&external_id={external}", "", 404),
    // Lists of one's own: here nothing is what is to be seen.
    ("GET", "/orders", "", 200),
    ("GET", "/api/orders", "", 200),
    ("GET", "/users/{user_id}/orders", "", 404),
    ("PUT", "/orders/{order_id}/status", r#"{"status":"processing"}"#, 403),
    ("PATCH", "/orders/{order_id}/status", r#"{"status":"processing"}"#, 403),
    ("POST", "/orders/{order_id}/cancel", "", 404),
    ("POST", "/api/orders", r#"{"order_id":"{id}","notes":"mine now"}"#, 404),
    ("POST", "/api/orders", r#"{"user_id":"{user}","order_items":[]}"#, 422),
    ("GET", "/api/orders/{order_id}", "", 404),
    ("GET", "/api/users/{user_id}/orders", "", 404),
    ("PATCH", "/api/orders/{order_id}/status", r#"{"status":"processing"}"#, 403),
    ("POST", "/api/orders/{order_id}/cancel", "", 404),
];
/// Those that are nobody's.
const OPEN: &[&str] = &["/health", "/ready", "/metrics", "/openapi.json", "/docs/"];

#[tokio::test(flavor = "multi_thread")]
async fn every_route_is_in_the_table() {
    let _turn = beside_others().await;
    let system = System::new().await;
    let api = system.api().await;
    let document = api.http().get("/openapi.json").await.expect_status(200).json();
    let known = |method: &str, route: &str| {
        OPEN.contains(&route)
            || ROUTES.iter().any(|(of, path, ..)| {
                let path = path.split('?').next().unwrap_or_default();
                *of == method && (path == route || path.replace("{external}", "{external_id}") == route)
            })
    };
    let mut routes = 0;
    for (route, operations) in document["paths"].as_object().expect("paths") {
        for method in operations.as_object().expect("operations").keys().map(|method| method.to_uppercase()) {
            assert!(known(&method, route), "the table of identities lacks {method} {route}");
            routes += 1;
        }
    }
    assert!(routes >= 20, "the document has lost routes: {document}");
}

/// What the table's places stand for.
struct Owned {
    id: String,
    correlation_id: String,
}

impl Owned {
    /// An order of `owner`.
    async fn by(owner: &Caller, api: &Api) -> Self {
        let mut sent = order("owner");
        sent["external_id"] = json!("market-1");
        let made = owner.send(api.http(), "POST", "/orders", &sent.to_string()).await.expect_status(201);
        Self { id: made.text("order_id"), correlation_id: made.text("correlation_id") }
    }

    async fn read(&self, owner: &Caller, api: &Api) -> Reply {
        owner.send(api.http(), "GET", &format!("/orders/{}", self.id), "").await.expect_status(200)
    }

    fn fill(&self, text: &str) -> String {
        text.replace("{id}", &self.id)
            .replace("{order_id}", &self.id)
            .replace("{user}", "owner")
            .replace("{user_id}", "owner")
            .replace("{external}", "market-1")
            .replace("{correlation_id}", &self.correlation_id)
    }
}

async fn others_see_and_change_nothing(system: &System, api: &Api, caller: fn(&str, Option<&str>) -> Caller) {
    let owner = caller("owner", None);
    let owned = Owned::by(&owner, api).await;
    let id = &owned.id;
    let before = owned.read(&owner, api).await;
    let thief = caller("thief", None);
    for (method, path, body, expected) in ROUTES {
        let (path, body) = (owned.fill(path), owned.fill(body));
        let reply = thief.send(api.http(), method, &path, &body).await;
        assert_eq!(reply.status, *expected, "{method} {path}: {}", reply.summary());
        match (*method, path.as_str()) {
            ("POST", "/orders/bulk") => {
                let answered = String::from_utf8_lossy(&reply.body).into_owned();
                assert!(answered.starts_with(r#"{"line":1,"status":404,"#), "{answered}");
            }
            ("GET", "/orders") => assert_eq!(reply.json(), json!([])),
            ("GET", "/api/orders") => assert_eq!(reply.json()["data"], json!([])),
            _ => assert_ne!(reply.status, 200, "{method} {path}: {}", reply.summary()),
        }
        let nobody = Caller(vec![]).send(api.http(), method, &path, &body).await;
        assert_eq!(nobody.status, 401, "{method} {path}: {}", nobody.summary());
        if !path.starts_with("/api") {
            assert_eq!(nobody.problem(), "unauthenticated");
        }
    }
    // Which paths there are is told to nobody, either.
    for path in ["/nowhere", "/api/nowhere"] {
        Caller(vec![]).send(api.http(), "GET", path, "").await.expect_status(401);
        thief.send(api.http(), "GET", path, "").await.expect_status(404);
    }
    for path in OPEN {
        Caller(vec![]).send(api.http(), "GET", path, "").await.expect_status(200);
    }
    assert_eq!(owned.read(&owner, api).await.body, before.body);
    assert_eq!(system.db.number("select count(*) from orders", &[]).await, 1, "somebody has stored another");

    // Who has a role crosses users, and may set a status; the owner may not, but cancel.
    let service = caller("shop", Some("service"));
    let path = format!("/orders/{id}");
    let processing = r#"{"status":"processing"}"#;
    owner.send(api.http(), "PUT", &format!("{path}/status"), processing).await.expect_status(403);
    service.send(api.http(), "PUT", &format!("{path}/status"), processing).await.expect_status(200);
    service
        .send(api.http(), "GET", &owned.fill("/orders/by-external/{external}?user_id={user}"), "")
        .await
        .expect_status(200);
    let update = owned.fill(r#"{"order_id":"{id}","notes":"by the shop"}"#);
    service.send(api.http(), "POST", "/orders", &update).await.expect_status(200);
    let for_another = service.send(api.http(), "POST", "/orders", &order("alice").to_string()).await;
    let for_another = for_another.expect_status(201).text("order_id");
    let alice = caller("alice", None);
    alice.send(api.http(), "GET", &format!("/orders/{for_another}"), "").await.expect_status(200);
    let own = alice.send(api.http(), "POST", "/orders", r#"{"amount":"1.50"}"#).await.expect_status(201);
    let cancelled = alice.send(api.http(), "POST", &format!("/orders/{}/cancel", own.text("order_id")), "").await;
    assert!([200, 409].contains(&cancelled.status), "{}", cancelled.summary());
}

#[tokio::test(flavor = "multi_thread")]
async fn behind_a_gateway_others_see_and_change_nothing() {
    let _turn = beside_others().await;
    let system = System::new().await;
    let (api, _worker) = (system.api_with(&[("AUTH_MODE", "header")]).await, system.worker().await);
    others_see_and_change_nothing(&system, &api, by_header).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn with_tokens_others_see_and_change_nothing() {
    let _turn = beside_others().await;
    let system = System::new().await;
    let (api, _worker) = (system.api_with(JWT).await, system.worker().await);
    others_see_and_change_nothing(&system, &api, by_token).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_that_is_not_ours_is_nobodys() {
    let _turn = beside_others().await;
    let system = System::new().await;
    let (api, _worker) = (system.api_with(JWT).await, system.worker().await);
    let owner = by_token("owner", None);
    let owned = Owned::by(&owner, &api).await;
    let before = owned.read(&owner, &api).await;
    for (what, token) in bad_tokens("owner") {
        let caller = pretender("owner", &token);
        for (method, path, body, _) in ROUTES {
            let reply = caller.send(api.http(), method, &owned.fill(path), &owned.fill(body)).await;
            let told = || format!("{what}: {method} {path}: {}", reply.summary());
            assert_eq!(reply.status, 401, "{}", told());
            assert!(reply.header("www-authenticate").is_some_and(|value| value.starts_with("Bearer")), "{}", told());
            if !path.starts_with("/api") {
                assert_eq!(reply.problem(), "unauthenticated", "{}", told());
            }
        }
        for path in OPEN {
            caller.send(api.http(), "GET", path, "").await.expect_status(200);
        }
    }
    assert_eq!(owned.read(&owner, &api).await.body, before.body);
    let send =
        async |caller: Caller, user: &str| caller.send(api.http(), "POST", "/orders", &order(user).to_string()).await;
    let good = signed(&claims("user"));
    for value in ["Basic dXNlcjpwYXNz".to_owned(), format!("Bearer  {good} x"), good.clone(), "Bearer".to_owned()] {
        send(Caller(vec![("authorization", value)]), "user").await.expect_status(401);
    }
    send(bearer(&good), "user").await.expect_status(201);
    let mut several = claims("user");
    several["aud"] = json!(["payments", "orders"]);
    send(bearer(&signed(&several)), "user").await.expect_status(201);
    // A token says who it is: the headers have no say.
    send(pretender("owner", &good), "owner").await.expect_status(422);
    let stored = system.db.lines("select user_id from orders order by 1", &[]).await;
    assert_eq!(stored, ["owner", "user", "user"]);
}
