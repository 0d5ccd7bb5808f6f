//! Who may do what: a user's orders are there for nobody else, whatever says who it is. Every route and every
//! method has its rows in a table of the two modules below; one that has none makes a test fail.

mod grpc;
mod http;

use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use jsonwebtoken::jwk::Jwk;
use jsonwebtoken::{Algorithm, EncodingKey, Header, encode};
use serde_json::{Value, json};
use test_support::{HttpClient, Method, Reply, System, beside_others, eventually, refused_at_start};

const SECRET: &str = "a secret of at least thirty-two bytes";

/// Somebody who asks: with the headers that say who it is.
struct Caller(Vec<(&'static str, String)>);

impl Caller {
    async fn send(&self, http: &HttpClient, method: &str, path: &str, body: &str) -> Reply {
        let mut headers: Vec<(&str, &str)> = self.0.iter().map(|(name, value)| (*name, value.as_str())).collect();
        if !body.is_empty() {
            let is_bulk = path.starts_with("/orders/bulk");
            headers.push(("content-type", if is_bulk { "application/x-ndjson" } else { "application/json" }));
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
        // As Keycloak and Entra ID say it.
        claims["role"] = json!(["offline_access", role]);
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

/// What would be this user's tokens, and are none: what is wrong with each.
fn bad_tokens(user: &str) -> Vec<(&'static str, String)> {
    let secret = EncodingKey::from_secret(SECRET.as_bytes());
    let forged = encode(&Header::default(), &claims(user), &EncodingKey::from_secret(&[7; 40])).expect("a token");
    let other_hash = encode(&Header::new(Algorithm::HS512), &claims(user), &secret).expect("a token");
    let (good, of_another) = (signed(&claims(user)), signed(&claims("another")));
    let [_, body, signature] = good.split('.').collect::<Vec<_>>()[..] else { panic!("{good}") };
    // {"alg":"none"}
    let unsigned = format!("eyJhbGciOiJub25lIn0.{body}.");
    let unsigned_with = format!("eyJhbGciOiJub25lIn0.{body}.{signature}");
    let tampered = of_another.replacen(of_another.split('.').nth(1).unwrap_or_default(), body, 1);
    let saying = |name: &str, value: Value| {
        let mut claims = claims(user);
        claims[name] = value;
        signed(&claims)
    };
    let without = |name: &str| {
        let mut claims = claims(user);
        claims.as_object_mut().expect("an object").remove(name);
        signed(&claims)
    };
    vec![
        ("forged", forged),
        ("of another algorithm", other_hash),
        ("alg none", unsigned),
        ("alg none with a signature", unsigned_with),
        ("tampered", tampered),
        ("expired", saying("exp", json!(in_seconds(-300)))),
        ("never expiring", without("exp")),
        ("expiring as text", saying("exp", json!("tomorrow"))),
        ("not good yet", saying("nbf", json!(in_seconds(300)))),
        ("not good yet, as text", saying("nbf", json!("tomorrow"))),
        ("of another issuer", saying("iss", json!("https://evil.example"))),
        ("of no issuer", without("iss")),
        ("for another audience", saying("aud", json!("payments"))),
        ("for no audience", without("aud")),
        ("of nobody", without("sub")),
        ("of an empty sub", saying("sub", json!(""))),
        ("of a sub that cannot be stored", saying("sub", json!("a\u{0}b"))),
        ("of a sub beyond measure", saying("sub", json!("u".repeat(300)))),
        ("garbage", "abc".to_owned()),
        ("dots", "..".to_owned()),
    ]
}

/// Who shows this token, and says in a gateway's words, which count for nothing here, that it may do everything.
fn pretender(user: &str, token: &str) -> Caller {
    let mut caller = bearer(token);
    caller.0.extend([("x-user-id", user.to_owned()), ("x-user-role", "admin".to_owned())]);
    caller
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
        (&[("JWT_SECRET", SECRET)], "AUTH_MODE"),
        (&[("AUTH_MODE", "header"), ("JWT_ISSUER", "https://issuer.example")], "JWT_ISSUER"),
        (&[("IDEMPOTENCY_TTL", "for ever")], "IDEMPOTENCY_TTL"),
    ] {
        let said = refused_at_start("api-service", &system.settings().with(changes)).await;
        assert!(said.contains(named), "{changes:?} said: {said}");
        assert!(!said.contains("thirty-two bytes"), "{said}");
    }
    let _ = std::fs::remove_dir_all(folder);
}
