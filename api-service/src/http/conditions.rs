//! What a request's headers ask for beside its body: `If-Match` (RFC 9110, section 13.1.1) and
//! `Idempotency-Key`.

use std::time::Duration;

use axum::http::{HeaderMap, HeaderName, header};
use serde_json::value::RawValue;
use shared::message::now;

use crate::{
    change::Expected,
    error::Problem,
    idempotency::{Claim, MAX_KEY},
    identity::Caller,
    json::{self, Digest},
    request::{Target, Upsert},
};

const IDEMPOTENCY_KEY: HeaderName = HeaderName::from_static("idempotency-key");
pub(crate) const IDEMPOTENCY_REPLAYED: HeaderName = HeaderName::from_static("idempotency-replayed");

/// The versions of which an order must be one, if the caller says so.
pub(super) fn if_match(headers: &HeaderMap) -> Result<Option<Expected>, Problem> {
    let mut versions = Vec::new();
    let mut is_there = false;
    for value in headers.get_all(header::IF_MATCH) {
        is_there = true;
        let value = value.to_str().map_err(|_| no_entity_tag())?;
        for tag in value.split(',').map(str::trim) {
            if tag == "*" {
                return Ok(Some(Expected::Any));
            }
            let (is_weak, opaque) = tag.strip_prefix("W/").map_or((false, tag), |tag| (true, tag));
            let opaque = opaque.strip_prefix('"').and_then(|tag| tag.strip_suffix('"')).ok_or_else(no_entity_tag)?;
            // A weak tag matches nothing here, nor does one that we never gave.
            if let (false, Ok(version)) = (is_weak, opaque.parse()) {
                versions.push(version);
            }
        }
    }
    Ok(is_there.then_some(Expected::OneOf(versions)))
}

fn no_entity_tag() -> Problem {
    Problem::Malformed("If-Match must be an entity tag as ETag gave it, such as \"3\" with its quotes, or *".to_owned())
}

/// The caller's key for `POST /orders` with this body.
pub(super) fn claim_of_upsert(
    headers: &HeaderMap,
    caller: &Caller,
    upsert: &Upsert,
    body: &[u8],
    wait: Option<Duration>,
) -> Result<Option<Claim>, Problem> {
    let Some(key) = key(headers)? else { return Ok(None) };
    let scope = match upsert {
        Upsert::Create(order) => scope(caller, Some(&order.user_id), None),
        Upsert::Update(change) => scope_of_target(caller, &change.target),
        Upsert::Delete(target) => scope_of_target(caller, target),
    };
    let read = serde_json::from_slice::<&RawValue>(body).ok().and_then(|raw| json::digest(raw).ok());
    let said = read.unwrap_or_else(|| Digest::of_text(&String::from_utf8_lossy(body)));
    let fingerprint = Digest::of_fields(&[("POST /orders", Some(said))]);
    Ok(Some(Claim { scope, key, fingerprint, answer_by: now() + wait.unwrap_or_default() }))
}

/// The caller's key for a move of this order: `what` names the route and where to.
pub(super) fn claim_of_move(
    headers: &HeaderMap,
    caller: &Caller,
    target: &Target,
    what: &str,
) -> Result<Option<Claim>, Problem> {
    let Some(key) = key(headers)? else { return Ok(None) };
    let order = Digest::of_text(&target.order_id.to_string());
    let fingerprint = Digest::of_fields(&[("order", Some(order)), ("move", Some(Digest::of_text(what)))]);
    Ok(Some(Claim { scope: scope_of_target(caller, target), key, fingerprint, answer_by: now() }))
}

fn scope_of_target(caller: &Caller, target: &Target) -> String {
    scope(caller, target.user_id.as_deref(), Some(target))
}

/// Whose key it is: the caller's; else of the user that the request names; else of the order.
fn scope(caller: &Caller, user_id: Option<&str>, target: Option<&Target>) -> String {
    match (caller.user().or(user_id), target) {
        (Some(user), _) => format!("user {user}"),
        (None, Some(target)) => format!("order {}", target.order_id),
        (None, None) => String::new(),
    }
}

/// The key, quoted (a string of RFC 8941) or bare. With a comma or a quote in it a bare one may be two
/// that a proxy has joined.
fn key(headers: &HeaderMap) -> Result<Option<String>, Problem> {
    let mut values = headers.get_all(IDEMPOTENCY_KEY).iter();
    let Some(value) = values.next() else { return Ok(None) };
    let text = value.to_str().ok().filter(|_| values.next().is_none()).map(str::trim);
    let quoted = |text: &str| text.len() > 1 && text.starts_with('"') && text.ends_with('"');
    let key = text.map(|text| if quoted(text) { &text[1..text.len() - 1] } else { text });
    let is_one = |key: &str| !key.contains('"') && (!key.contains(',') || text.is_some_and(quoted));
    match key {
        Some(key) if !key.is_empty() && key.len() <= MAX_KEY && is_one(key) => Ok(Some(key.to_owned())),
        _ => Err(Problem::Malformed(format!(
            "Idempotency-Key must be given once, with 1 to {MAX_KEY} characters of ASCII, and in quotes where it has a comma"
        ))),
    }
}

#[cfg(test)]
mod tests {
    use axum::http::HeaderValue;

    use super::*;

    fn headers(name: HeaderName, values: &[&'static str]) -> HeaderMap {
        values.iter().map(|value| (name.clone(), HeaderValue::from_static(value))).collect()
    }

    #[test]
    fn strong_entity_tags_name_versions() {
        let of = |values: &[&'static str]| if_match(&headers(header::IF_MATCH, values));
        let versions = |values: &[i64]| Some(Expected::OneOf(values.to_vec()));
        assert_eq!(of(&[]).unwrap(), None);
        assert_eq!(of(&["*"]).unwrap(), Some(Expected::Any));
        assert_eq!(of(&["\"3\""]).unwrap(), versions(&[3]));
        assert_eq!(of(&["\"3\", \"5\"", "\"7\""]).unwrap(), versions(&[3, 5, 7]));
        assert_eq!(of(&["W/\"3\", \"of another\""]).unwrap(), versions(&[]));
        for broken in ["3", "\"3", "", "\"3\";", "\"3\" \"4"] {
            assert!(matches!(of(&[broken]), Err(Problem::Malformed(_))), "{broken}");
        }
    }

    #[test]
    fn a_key_is_given_once_and_its_quotes_are_none_of_it() {
        let of = |values: &[&'static str]| key(&headers(IDEMPOTENCY_KEY, values));
        assert_eq!(of(&[]).unwrap(), None);
        assert_eq!(of(&["\"8e03978e\""]).unwrap(), of(&["8e03978e"]).unwrap());
        assert_eq!(of(&["\"a,b\""]).unwrap().as_deref(), Some("a,b"));
        for broken in
            [&[""][..], &["\"\""], &["\""], &["a", "a"], &["\"a\", \"b\""], &["a, b"], &["\"a\";p=1"], &["\"a"]]
        {
            assert!(matches!(of(broken), Err(Problem::Malformed(_))), "{broken:?}");
        }
    }
}
