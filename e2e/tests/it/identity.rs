//! Who may do what: a user's orders are there for nobody else, whatever says who it is.

use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use jsonwebtoken::jwk::Jwk;
use jsonwebtoken::{Algorithm, EncodingKey, Header, encode};
use serde_json::{Value, json};
use test_support::{Api, HttpClient, Method, Reply, System, beside_others, eventually, order, refused_at_start};

const SECRET: &str = "a secret of at least thirty-two bytes";

/// Every route, and how it answers somebody else than the owner of the order that it names.
/// `{id}`, `{user}`, `{external}` and `{request}` are the owner's.
const ROUTES: &[(&str, &str, &str, &[u16])] = &[
    ("POST", "/orders", r#"{"order_id":"{id}","notes":"mine now"}"#, &[404]),
    ("POST", "/orders", r#"{"order_id":"{id}","status":"deleted"}"#, &[404]),
    ("POST", "/orders", r#"{"order_id":"{id}","user_id":"{user}","notes":"mine now"}"#, &[422]),
    ("GET", "/orders/by-external/{external}?user_id={user}", "", &[404]),
    ("GET", "/orders/by-external/{external}", "", &[404]),
    ("GET", "/orders/{order_id}", "", &[404]),
    ("GET", "/orders/{order_id}/history", "", &[404]),
    ("GET", "/orders/{order_id}/requests/{correlation_id}", "", &[404]),
    ("GET", "/orders/{order_id}/watch", "", &[404]),
    ("GET", "/orders?user_id={user}", "", &[404]),
    ("GET", "/orders?user_id={user}&external_id={external}", "", &[404]),
    ("GET", "/users/{user_id}/orders", "", &[404]),
    ("PUT", "/orders/{order_id}/status", r#"{"status":"processing"}"#, &[403]),
    ("PATCH", "/orders/{order_id}/status", r#"{"status":"processing"}"#, &[403]),
    ("POST", "/orders/{order_id}/cancel", "", &[404]),
    ("POST", "/api/orders", r#"{"order_id":"{id}","notes":"mine now"}"#, &[404]),
    ("POST", "/api/orders", r#"{"user_id":"{user}","order_items":[]}"#, &[422]),
    ("GET", "/api/orders/{order_id}", "", &[404]),
    ("GET", "/api/users/{user_id}/orders", "", &[404]),
    ("PATCH", "/api/orders/{order_id}/status", r#"{"status":"processing"}"#, &[403]),
    ("POST", "/api/orders/{order_id}/cancel", "", &[404]),
];
/// Those that are nobody's.
const OPEN: &[&str] = &["/health", "/ready", "/metrics"];

#[test]
fn every_route_is_in_the_table() {
    let http = Path::new(env!("CARGO_MANIFEST_DIR")).join("../api-service/src/http");
    let routes_of = |file: &str, prefix: &str| -> Vec<String> {
        let source = std::fs::read_to_string(http.join(file)).expect("a router");
        let paths = source.split(".route(\"").skip(1).filter_map(|rest| rest.split('"').next());
        paths.map(|path| format!("{prefix}{path}")).collect()
    };
    let routes = [routes_of("mod.rs", ""), routes_of("retail.rs", "/api")].concat();
    let known = |route: &str| {
        OPEN.contains(&route)
            || ROUTES.iter().any(|(_, path, ..)| {
                let path = path.split('?').next().unwrap_or_default();
                path == route || path.replace("{external}", "{external_id}") == route
            })
    };
    assert!(routes.len() >= 15, "the routers have moved");
    assert_eq!(routes.iter().find(|route| !known(route)), None, "a route that the table of identities lacks");
}

/// Somebody who asks: with the headers that say who it is.
struct Caller(Vec<(&'static str, String)>);

impl Caller {
    async fn send(&self, http: &HttpClient, method: &str, path: &str, body: &str) -> Reply {
        let mut headers: Vec<(&str, &str)> = self.0.iter().map(|(name, value)| (*name, value.as_str())).collect();
        if !body.is_empty() {
            headers.push(("content-type", "application/json"));
        }
        let method = Method::from_bytes(method.as_bytes()).expect("a method");
        http.send(method, path, &headers, Bytes::from(body.to_owned())).await.expect("an answer")
    }
}

fn by_header(user: &str, role: Option<&str>) -> Caller {
    let role = role.map(|role| ("x-user-role", role.to_owned()));
    Caller([("x-user-id", user.to_owned())].into_iter().chain(role).collect())
}

fn by_token(user: &str, role: Option<&str>) -> Caller {
    let mut claims = claims(user);
    if let Some(role) = role {
        claims["role"] = json!(role);
    }
    bearer(&signed(&claims))
}

fn bearer(token: &str) -> Caller {
    Caller(vec![("authorization", format!("Bearer {token}"))])
}

fn in_seconds(seconds: i64) -> i64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).expect("after 1970").as_secs();
    i64::try_from(now).expect("not so far") + seconds
}

fn claims(user: &str) -> Value {
    json!({ "sub": user, "exp": in_seconds(300), "iss": "https://issuer.example", "aud": "orders" })
}

fn signed(claims: &Value) -> String {
    encode(&Header::default(), claims, &EncodingKey::from_secret(SECRET.as_bytes())).expect("a token")
}

const JWT: &[(&str, &str)] = &[
    ("AUTH_MODE", "jwt"),
    ("JWT_SECRET", SECRET),
    ("JWT_ISSUER", "https://issuer.example"),
    ("JWT_AUDIENCE", "orders"),
];

async fn others_see_and_change_nothing(api: &Api, caller: fn(&str, Option<&str>) -> Caller) {
    let owner = caller("owner", None);
    let mut sent = order("owner");
    sent["external_id"] = json!("market-1");
    let made = owner.send(api.http(), "POST", "/orders", &sent.to_string()).await.expect_status(201);
    let id = made.text("order_id");
    let fill = |text: &str| {
        text.replace("{id}", &id)
            .replace("{order_id}", &id)
            .replace("{user}", "owner")
            .replace("{user_id}", "owner")
            .replace("{external}", "market-1")
            .replace("{correlation_id}", &made.text("correlation_id"))
    };
    let order = owner.send(api.http(), "GET", &format!("/orders/{id}"), "").await.expect_status(200);
    let thief = caller("thief", None);
    for (method, path, body, expected) in ROUTES {
        let reply = thief.send(api.http(), method, &fill(path), &fill(body)).await;
        assert!(expected.contains(&reply.status), "{method} {path}: {}", reply.summary());
        let nobody = Caller(vec![]).send(api.http(), method, &fill(path), &fill(body)).await;
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
    let listed = thief.send(api.http(), "GET", "/orders", "").await.expect_status(200);
    assert_eq!(listed.json(), json!([]));
    let listed = thief.send(api.http(), "GET", "/api/orders", "").await.expect_status(200);
    assert_eq!(listed.json()["data"], json!([]));
    for path in OPEN {
        Caller(vec![]).send(api.http(), "GET", path, "").await.expect_status(200);
    }
    let after = owner.send(api.http(), "GET", &format!("/orders/{id}"), "").await.expect_status(200);
    assert_eq!(order.body, after.body);

    // Who has a role crosses users, and may set a status; the owner may not, but cancel.
    let service = caller("shop", Some("service"));
    let path = format!("/orders/{id}");
    let processing = r#"{"status":"processing"}"#;
    owner.send(api.http(), "PUT", &format!("{path}/status"), processing).await.expect_status(403);
    service.send(api.http(), "PUT", &format!("{path}/status"), processing).await.expect_status(200);
    service
        .send(api.http(), "GET", &fill("/orders/by-external/{external}?user_id={user}"), "")
        .await
        .expect_status(200);
    let update = fill(r#"{"order_id":"{id}","notes":"by the shop"}"#);
    service.send(api.http(), "POST", "/orders", &update).await.expect_status(200);
    let for_another = service.send(api.http(), "POST", "/orders", &self::order("alice").to_string()).await;
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
    others_see_and_change_nothing(&api, by_header).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn with_tokens_others_see_and_change_nothing() {
    let _turn = beside_others().await;
    let system = System::new().await;
    let (api, _worker) = (system.api_with(JWT).await, system.worker().await);
    others_see_and_change_nothing(&api, by_token).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_that_is_not_ours_is_nobodys() {
    let _turn = beside_others().await;
    let system = System::new().await;
    let (api, _worker) = (system.api_with(JWT).await, system.worker().await);
    let with = |name: &str, value: Value| {
        let mut claims = claims("user");
        claims[name] = value;
        claims
    };
    let forged = encode(&Header::default(), &claims("user"), &EncodingKey::from_secret(&[7; 40])).expect("a token");
    let other_hash =
        encode(&Header::new(Algorithm::HS512), &claims("user"), &EncodingKey::from_secret(SECRET.as_bytes()))
            .expect("a token");
    let good = signed(&claims("user"));
    let [_, body, signature] = good.split('.').collect::<Vec<_>>()[..] else { panic!("{good}") };
    // {"alg":"none"}
    let unsigned = format!("eyJhbGciOiJub25lIn0.{body}.");
    let unsigned_with = format!("eyJhbGciOiJub25lIn0.{body}.{signature}");
    let mut without_sub = claims("user");
    without_sub.as_object_mut().expect("an object").remove("sub");
    let mut without_exp = claims("user");
    without_exp.as_object_mut().expect("an object").remove("exp");
    let tampered = good.replacen(body, signed(&claims("admin")).split('.').nth(1).unwrap_or_default(), 1);
    for (what, token) in [
        ("forged", forged),
        ("of another algorithm", other_hash),
        ("alg none", unsigned),
        ("alg none with a signature", unsigned_with),
        ("tampered", tampered),
        ("expired", signed(&with("exp", json!(in_seconds(-300))))),
        ("never expiring", signed(&without_exp)),
        ("expiring as text", signed(&with("exp", json!("tomorrow")))),
        ("not good yet", signed(&with("nbf", json!(in_seconds(300))))),
        ("not good yet, as text", signed(&with("nbf", json!("tomorrow")))),
        ("of another issuer", signed(&with("iss", json!("https://evil.example")))),
        ("for another audience", signed(&with("aud", json!("payments")))),
        ("of nobody", signed(&without_sub)),
        ("of an empty sub", signed(&with("sub", json!("")))),
        ("of a sub that cannot be stored", signed(&with("sub", json!("a\u{0}b")))),
        ("of a sub beyond measure", signed(&with("sub", json!("u".repeat(300))))),
        ("garbage", "abc".to_owned()),
        ("dots", "..".to_owned()),
    ] {
        let reply = bearer(&token).send(api.http(), "POST", "/orders", &order("user").to_string()).await;
        assert_eq!((reply.status, reply.problem().as_str()), (401, "unauthenticated"), "{what}: {}", reply.summary());
        assert!(reply.header("www-authenticate").is_some_and(|value| value.starts_with("Bearer")), "{what}");
    }
    for value in ["Basic dXNlcjpwYXNz".to_owned(), format!("Bearer  {good} x"), good.clone(), "Bearer".to_owned()] {
        let caller = Caller(vec![("authorization", value)]);
        assert_eq!(caller.send(api.http(), "POST", "/orders", &order("user").to_string()).await.status, 401);
    }
    bearer(&good).send(api.http(), "POST", "/orders", &order("user").to_string()).await.expect_status(201);
    let several = signed(&with("aud", json!(["payments", "orders"])));
    bearer(&several).send(api.http(), "POST", "/orders", &order("user").to_string()).await.expect_status(201);
    // A token says who it is: the header has no say.
    let mut both = by_token("user", None);
    both.0.push(("x-user-id", "owner".to_owned()));
    both.0.push(("x-user-role", "admin".to_owned()));
    both.send(api.http(), "POST", "/orders", &order("owner").to_string()).await.expect_status(422);
    assert_eq!(system.db.number("select count(*) from orders where user_id <> 'user'", &[]).await, 0);
}

/// A new key, as openssl makes one.
fn new_key(folder: &Path, name: &str) -> (EncodingKey, Value, Vec<u8>) {
    let private = folder.join(format!("{name}.pem"));
    let make = format!(
        "openssl genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-256 -out {0} && openssl pkey -in {0} -pubout",
        private.display()
    );
    let made = std::process::Command::new("sh").args(["-c", &make]).output().expect("sh");
    assert!(made.status.success(), "openssl: {}", String::from_utf8_lossy(&made.stderr));
    let key = EncodingKey::from_ec_pem(&std::fs::read(private).expect("the key")).expect("a key");
    let mut jwk = serde_json::to_value(Jwk::from_encoding_key(&key, Algorithm::ES256).expect("a JWK")).expect("JSON");
    jwk["kid"] = json!(name);
    (key, jwk, made.stdout)
}

fn signed_by(key: &EncodingKey, id: &str) -> Caller {
    let header = Header { kid: Some(id.to_owned()), ..Header::new(Algorithm::ES256) };
    bearer(&encode(&header, &claims("user"), key).expect("a token"))
}

#[tokio::test(flavor = "multi_thread")]
async fn the_keys_of_a_jwks_file_may_change_while_we_run() {
    let _turn = beside_others().await;
    let system = System::new().await;
    let folder = std::env::temp_dir().join(format!("jwks-{}", uuid::Uuid::now_v7()));
    std::fs::create_dir_all(&folder).expect("a folder");
    let file = folder.join("jwks.json");
    let publish = |keys: Value| {
        // As it is done where readers must never see half of it.
        std::fs::write(folder.join("next"), keys.to_string()).expect("the keys");
        std::fs::rename(folder.join("next"), &file).expect("the file");
    };
    let ((old, old_jwk, old_pem), (new, new_jwk, _)) = (new_key(&folder, "old"), new_key(&folder, "new"));
    let encryption = json!({ "kty": "RSA", "use": "enc", "n": "AQAB", "e": "AQAB" });
    let secret = json!({ "kty": "oct", "kid": "secret", "k": "c2VjcmV0LXNlY3JldC1zZWNyZXQtc2VjcmV0LXNlY3Ix" });
    publish(json!({ "keys": [encryption, old_jwk, secret] }));
    let settings =
        [("AUTH_MODE", "jwt"), ("JWT_JWKS_FILE", file.to_str().expect("a path")), ("JWT_AUDIENCE", "orders")];
    let api = system.api_with(&settings).await;
    let status = async |caller: Caller| {
        caller.send(api.http(), "GET", &format!("/orders/{}", uuid::Uuid::now_v7()), "").await.status
    };
    assert_eq!(status(signed_by(&old, "old")).await, 404);
    assert_eq!(status(signed_by(&new, "new")).await, 401);
    let by_secret = Header { kid: Some("secret".into()), ..Header::default() };
    let by_secret = EncodingKey::from_base64_secret("c2VjcmV0LXNlY3JldC1zZWNyZXQtc2VjcmV0LXNlY3Ix")
        .and_then(|key| encode(&by_secret, &claims("user"), &key));
    assert_eq!(status(bearer(&by_secret.expect("a token"))).await, 401, "a set's secret is everybody's");
    // A public key is no secret.
    let confused = encode(&Header::default(), &claims("user"), &EncodingKey::from_secret(&old_pem)).expect("a token");
    assert_eq!(status(bearer(&confused)).await, 401);

    publish(json!({ "keys": "broken" }));
    publish(json!({ "keys": [old_jwk, new_jwk] }));
    eventually("the new key to be known", || async {
        match status(signed_by(&new, "new")).await {
            404 => Ok(()),
            other => Err(other.to_string()),
        }
    })
    .await;
    assert_eq!(status(signed_by(&old, "old")).await, 404, "both are good meanwhile");
    publish(json!({ "keys": [new_jwk] }));
    eventually("the old key to be refused", || async {
        match status(signed_by(&old, "old")).await {
            401 => Ok(()),
            other => Err(other.to_string()),
        }
    })
    .await;
    assert_eq!(status(signed_by(&new, "old")).await, 401, "under another key's name");

    // One key alone, as a file.
    let pem = folder.join("public.pem");
    std::fs::write(&pem, &old_pem).expect("the key");
    let settings = [("AUTH_MODE", "jwt"), ("JWT_KEY_FILE", pem.to_str().expect("a path")), ("JWT_AUDIENCE", "orders")];
    let api = system.api_with(&settings).await;
    let path = format!("/orders/{}", uuid::Uuid::now_v7());
    assert_eq!(signed_by(&old, "any").send(api.http(), "GET", &path, "").await.status, 404);
    assert_eq!(signed_by(&new, "any").send(api.http(), "GET", &path, "").await.status, 401);
    let _ = std::fs::remove_dir_all(folder);
}

#[tokio::test(flavor = "multi_thread")]
async fn settings_that_would_let_everybody_in_are_refused() {
    let _turn = beside_others().await;
    let system = System::new().await;
    let folder = std::env::temp_dir().join(format!("jwt-{}", uuid::Uuid::now_v7()));
    std::fs::create_dir_all(&folder).expect("a folder");
    let broken = folder.join("broken");
    std::fs::write(&broken, "{\"keys\":[]}").expect("a file");
    new_key(&folder, "private");
    let (broken, private) = (broken.display().to_string(), folder.join("private.pem").display().to_string());
    for (changes, named) in [
        (&[("AUTH_MODE", "everybody")][..], "AUTH_MODE"),
        (&[("AUTH_MODE", "jwt")], "JWT_SECRET"),
        (&[("AUTH_MODE", "jwt"), ("JWT_SECRET", "short")], "JWT_SECRET"),
        (&[("AUTH_MODE", "jwt"), ("JWT_SECRET", SECRET), ("JWT_JWKS_FILE", &broken)], "JWT_JWKS_FILE"),
        (&[("AUTH_MODE", "jwt"), ("JWT_JWKS_FILE", &broken)], "JWT_JWKS_FILE"),
        (&[("AUTH_MODE", "jwt"), ("JWT_JWKS_FILE", "/no/such/file")], "/no/such/file"),
        (&[("AUTH_MODE", "jwt"), ("JWT_KEY_FILE", &broken)], "JWT_KEY_FILE"),
        (&[("AUTH_MODE", "jwt"), ("JWT_KEY_FILE", &private)], "private key"),
        (&[("IDEMPOTENCY_TTL", "for ever")], "IDEMPOTENCY_TTL"),
    ] {
        let said = refused_at_start("api-service", &system.settings().with(changes)).await;
        assert!(said.contains(named), "{changes:?} said: {said}");
        assert!(!said.contains("thirty-two bytes"), "{said}");
    }
    let _ = std::fs::remove_dir_all(folder);
}
