//! What a request's headers ask for beside its body: `If-Match` (RFC 9110, section 13.1.1) and
//! `Idempotency-Key`.

use std::time::Duration;

use axum::http::{HeaderMap, HeaderName, header};
use serde_json::value::RawValue;
use shared::{message::now, order::whole};

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

/// What a proxy that compresses puts behind the tag of an answer: `"2-gzip"` of Apache, `"2--gzip"` of Jetty,
/// and of others by the names of their codings (RFC 9110, section 8.4.1).
const CODINGS: [&str; 8] = ["gzip", "br", "zstd", "deflate", "compress", "dcb", "dcz", "identity"];

/// Entity tags that a caller sends back (RFC 9110, section 8.8.3).
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Tags {
    Any,
    /// Those of them that are versions of an order.
    Versions(Vec<i64>),
}

impl Tags {
    /// `None` where the header is not there.
    ///
    /// A weak tag is as good as a strong one. nginx makes each tag weak that it compresses, and a strict
    /// comparison would then match none. It is safe because a tag is the order's version: whatever is made of
    /// the bytes on their way, what is shown is that version. For the same reason a coding behind it is left
    /// out. A tag that is none of ours is passed over.
    ///
    /// # Errors
    /// When it is no list of tags.
    pub(super) fn of(headers: &HeaderMap, name: HeaderName) -> Result<Option<Self>, NoTags> {
        let (mut versions, mut is_there) = (Vec::new(), false);
        for value in headers.get_all(name) {
            is_there = true;
            let mut rest = value.to_str().map_err(|_| NoTags)?.trim_start_matches([' ', '\t', ',']);
            while !rest.is_empty() {
                if rest.starts_with('*') {
                    return Ok(Some(Self::Any));
                }
                let tag = rest.strip_prefix("W/").unwrap_or(rest).strip_prefix('"').ok_or(NoTags)?;
                let (opaque, behind) = tag.split_once('"').ok_or(NoTags)?;
                versions.extend(version(opaque));
                let behind = behind.trim_start_matches([' ', '\t']);
                if !behind.is_empty() && !behind.starts_with(',') {
                    return Err(NoTags);
                }
                rest = behind.trim_start_matches([' ', '\t', ',']);
            }
        }
        Ok(is_there.then_some(Self::Versions(versions)))
    }
}

/// A header that holds no entity tags.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct NoTags;

fn version(mut opaque: &str) -> Option<i64> {
    while let Some(before) = CODINGS.iter().find_map(|coding| opaque.strip_suffix(coding)) {
        opaque = before.trim_end_matches(['-', ';']);
        if opaque.len() == before.len() {
            return None;
        }
    }
    whole(opaque).filter(|version| *version >= 0)
}

/// The versions of which an order must be one, if the caller says so.
pub(super) fn if_match(headers: &HeaderMap) -> Result<Option<Expected>, Problem> {
    match Tags::of(headers, header::IF_MATCH) {
        Ok(None) => Ok(None),
        Ok(Some(Tags::Any)) => Ok(Some(Expected::Any)),
        Ok(Some(Tags::Versions(versions))) if !versions.is_empty() => Ok(Some(Expected::OneOf(versions))),
        // To call the order changed would send the caller back for the same tag without an end.
        Ok(Some(Tags::Versions(_))) | Err(NoTags) => Err(Problem::Malformed(
            "If-Match holds no version of an order: send the ETag that the order was read with, such as \"3\" with its \
             quotes, or *"
                .to_owned(),
        )),
    }
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
    fn a_version_is_found_in_what_proxies_make_of_a_tag() {
        let of = |values: &[&'static str]| if_match(&headers(header::IF_MATCH, values));
        let versions = |values: &[i64]| Some(Expected::OneOf(values.to_vec()));
        assert_eq!(of(&[]).unwrap(), None);
        assert_eq!(of(&["*"]).unwrap(), Some(Expected::Any));
        assert_eq!(of(&["\"3\", \"5\"", "\"7\""]).unwrap(), versions(&[3, 5, 7]));
        assert_eq!(of(&["W/\"3\",, \"a,b\" , \"of another\","]).unwrap(), versions(&[3]));
        for tag in [
            "\"2\"",
            "W/\"2\"",
            "\"2-gzip\"",
            "W/\"2-gzip\"",
            "\"2--gzip\"",
            "\"2;gzip\"",
            "\"2-br\"",
            "\"2-zstd\"",
            "\"2-deflate-gzip\"",
        ] {
            assert_eq!(of(&[tag]).unwrap(), versions(&[2]), "{tag}");
        }
    }

    #[test]
    fn a_list_without_a_version_is_refused_by_its_name() {
        for broken in [
            "3",
            "\"3",
            "",
            "\"3\";",
            "\"3\" \"4",
            "w/\"3\"",
            "\"\"",
            "\"of another\"",
            "\"-3\"",
            "\"+3\"",
            "\"03\"",
            "\"2gzip\"",
            "\"2-other\"",
            "\"2-gzip-3\"",
            "\"gzip\"",
            "\"99999999999999999999\"",
        ] {
            match if_match(&headers(header::IF_MATCH, &[broken])) {
                Err(Problem::Malformed(said)) => assert!(said.starts_with("If-Match holds no version"), "{said}"),
                other => panic!("{broken}: {other:?}"),
            }
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
