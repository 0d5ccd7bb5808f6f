//! `GET /orders` and `GET /users/{user_id}/orders`: filters, and pages by cursor (RFC 8288).

use axum::{
    Extension,
    extract::{Path, State, rejection::PathRejection},
    http::{HeaderValue, Uri, header},
    response::{IntoResponse, Response},
};
use base64::{Engine as _, prelude::BASE64_URL_SAFE_NO_PAD};
use percent_encoding::percent_decode_str;
use serde::Deserialize;
use shared::{cache::Key, order::Violation};
use time::{OffsetDateTime, format_description::well_known::Rfc3339};
use utoipa::IntoParams;
use uuid::Uuid;

use super::{
    App, openapi, query,
    reads::{json, text},
};
use crate::{
    error::Problem,
    identity::Caller,
    store::{
        list::{self, Filter, Page, Place},
        read::{self, Order},
    },
};

const DEFAULT_LIMIT: usize = 50;
const MAX_LIMIT: usize = 200;
const CURSOR: &str = "cursor";
/// Years 1 to 9999, in microseconds: what both RFC 3339 and PostgreSQL can say.
const TIMES: std::ops::RangeInclusive<i128> = -62_135_596_800_000_000..=253_402_300_799_999_999;

#[derive(Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub(super) struct OfAll {
    /// Those of one user
    #[param(nullable = false, min_length = 1)]
    user_id: Option<String>,
}

/// What a list is asked for, each as it is written.
#[derive(Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub(super) struct ListQuery {
    /// Those in one state
    #[param(nullable = false, min_length = 1)]
    status: Option<String>,
    /// Those of one lifecycle
    #[param(nullable = false, min_length = 1)]
    lifecycle: Option<String>,
    /// The one that has the marketplace's own id, of one user
    #[param(nullable = false, min_length = 1)]
    external_id: Option<String>,
    /// Created then or later
    #[param(value_type = Option<openapi::Time>)]
    created_from: Option<String>,
    /// Created before that
    #[param(value_type = Option<openapi::Time>)]
    created_to: Option<String>,
    #[param(value_type = Option<u32>, minimum = 1, maximum = 200, default = 50)]
    limit: Option<String>,
    /// From the `Link` of the page before
    cursor: Option<String>,
}

/// Orders, newest first, a page at a time
#[utoipa::path(
    get, path = "/orders", tag = "orders",
    params(OfAll, ListQuery),
    responses(
        (status = 200, description = "A page; `Link: <…>; rel=\"next\"` is the next one, if there is more",
            body = Vec<Order>),
        openapi::Malformed, openapi::NotFound, openapi::BadQuery, openapi::Refused,
    )
)]
pub(super) async fn all(
    State(app): State<App>,
    Extension(caller): Extension<Caller>,
    uri: Uri,
    query::Asked(OfAll { user_id }): query::Asked<OfAll>,
    query::Asked(query): query::Asked<ListQuery>,
) -> Result<Response, Problem> {
    respond(&app, &caller, &uri, Asked::parse(user_id, query)?).await
}

/// Orders of one user, newest first, a page at a time
#[utoipa::path(
    get, path = "/users/{user_id}/orders", tag = "orders",
    params(("user_id" = String, Path), ListQuery),
    responses(
        (status = 200, description = "A page; `Link: <…>; rel=\"next\"` is the next one, if there is more",
            body = Vec<Order>),
        openapi::Malformed, openapi::NotFound, openapi::BadQuery, openapi::Refused,
    )
)]
pub(super) async fn of_user(
    State(app): State<App>,
    Extension(caller): Extension<Caller>,
    path: Result<Path<String>, PathRejection>,
    uri: Uri,
    query::Asked(query): query::Asked<ListQuery>,
) -> Result<Response, Problem> {
    let user_id = text(path)?;
    let asked = Asked { user_id: Some(user_id), ..Asked::parse(None, query)? };
    respond(&app, &caller, &uri, asked).await
}

async fn respond(app: &App, caller: &Caller, uri: &Uri, mut asked: Asked) -> Result<Response, Problem> {
    if asked.user_id.as_deref().is_some_and(|user_id| !caller.sees(user_id)) {
        return Err(Problem::UnknownOrder);
    }
    let whose = if asked.external_id.is_some() { caller.user() } else { caller.only() };
    asked.user_id = asked.user_id.or_else(|| whose.map(ToOwned::to_owned));
    let page = find(app, &asked).await?;
    let mut response = json(&page.orders).into_response();
    if let Some(end) = page.end()
        && let Ok(link) = HeaderValue::try_from(next_link(uri, end))
    {
        response.headers_mut().insert(header::LINK, link);
    }
    Ok(response)
}

async fn find(app: &App, asked: &Asked) -> Result<Page, Problem> {
    let nothing = Page { orders: Vec::new(), more: false };
    let texts = [&asked.user_id, &asked.external_id, &asked.status, &asked.lifecycle];
    // PostgreSQL's text cannot hold it, so no order has it.
    if texts.into_iter().flatten().any(|text| text.contains('\0')) {
        return Ok(nothing);
    }
    let db = &app.orders.db;
    let Some(external_id) = &asked.external_id else {
        let filter = Filter {
            user_id: asked.user_id.clone(),
            status: asked.status.clone(),
            lifecycle: asked.lifecycle.clone(),
            from: asked.from,
            before: asked.before,
        };
        let page = async { list::orders(db, &filter, asked.limit).await.map(Some) };
        let page = match &asked.user_id {
            // What is asked for most, and therefore kept.
            Some(user_id) if asked.is_first_page() => {
                let is_theirs = |page: &Page| page.orders.iter().all(|order| order.user_id == *user_id);
                app.orders.cache.through(Key::List(user_id), is_theirs, page).await?
            }
            _ => page.await?,
        };
        return page.ok_or(Problem::Internal);
    };
    let Some(user_id) = &asked.user_id else {
        let reason = "goes with user_id: it is unique among one user's orders only";
        return Err(Problem::Invalid(vec![Violation::new("/external_id", reason)]));
    };
    let found = read::order_by_external(db, user_id, external_id).await?;
    let is_meant = |order: &Order| {
        asked.status.as_ref().is_none_or(|status| *status == order.status)
            && asked.lifecycle.as_ref().is_none_or(|lifecycle| *lifecycle == order.lifecycle)
            && order.created_at >= asked.from
            && Place::of(order) < asked.before
    };
    Ok(Page { orders: found.into_iter().filter(is_meant).collect(), ..nothing })
}

/// What a query asks for.
#[derive(Debug)]
struct Asked {
    user_id: Option<String>,
    external_id: Option<String>,
    status: Option<String>,
    lifecycle: Option<String>,
    from: OffsetDateTime,
    before: Place,
    limit: usize,
}

impl Asked {
    fn parse(user_id: Option<String>, query: ListQuery) -> Result<Self, Problem> {
        let mut check = Check(Vec::new());
        let from = check.read("created_from", query.created_from, |text| micros(&text)).unwrap_or(*TIMES.start());
        let to = check.read("created_to", query.created_to, |text| micros(&text)).unwrap_or(*TIMES.end());
        // Nothing is older than the nil id of a time, and of that time: this is "before that time".
        let end = Place { created_at: time(to), order_id: Uuid::nil() };
        let cursor = check.read("cursor", query.cursor, |text| decode(&text));
        let asked = Self {
            user_id: check.read("user_id", user_id, Ok),
            external_id: check.read("external_id", query.external_id, Ok),
            status: check.read("status", query.status, Ok),
            lifecycle: check.read("lifecycle", query.lifecycle, Ok),
            from: time(from),
            before: cursor.map_or(end, |cursor| cursor.min(end)),
            limit: check.read("limit", query.limit, |text| limit(&text)).unwrap_or(DEFAULT_LIMIT),
        };
        let Check(violations) = check;
        if violations.is_empty() { Ok(asked) } else { Err(Problem::Invalid(violations)) }
    }

    /// Is it nothing but a user's newest orders?
    fn is_first_page(&self) -> bool {
        let is_unfiltered = self.status.is_none() && self.lifecycle.is_none() && self.external_id.is_none();
        let is_all = self.from == time(*TIMES.start()) && self.before.created_at == time(*TIMES.end());
        is_unfiltered && is_all && self.limit == DEFAULT_LIMIT
    }
}

/// The broken rules of a query: all of them, not just the first.
pub(super) struct Check(pub Vec<Violation>);

impl Check {
    /// What a parameter says, if it is there and makes sense.
    pub(super) fn read<T>(
        &mut self,
        name: &str,
        given: Option<String>,
        read: impl FnOnce(String) -> Result<T, String>,
    ) -> Option<T> {
        let read = match given? {
            text if text.is_empty() => Err("is empty: leave it out, or give a value".to_owned()),
            text => read(text),
        };
        read.map_err(|reason| self.0.push(Violation::new(format!("/{name}"), reason))).ok()
    }
}

fn limit(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(limit) if (1..=MAX_LIMIT).contains(&limit) => Ok(limit),
        _ => Err(format!("must be a whole number from 1 to {MAX_LIMIT}")),
    }
}

/// In whole microseconds, as PostgreSQL keeps times; what is between two of them is the later one
/// to "from then on" as to "before then".
fn micros(text: &str) -> Result<i128, String> {
    let Ok(time) = OffsetDateTime::parse(text, &Rfc3339) else {
        return Err("must be a time such as 2026-01-31T12:00:00Z (RFC 3339; a + is written %2B)".to_owned());
    };
    let nanos = time.unix_timestamp_nanos();
    let micros = nanos.div_euclid(1_000) + i128::from(nanos.rem_euclid(1_000) > 0);
    Ok(micros.clamp(*TIMES.start(), *TIMES.end()))
}

/// Of microseconds within [`TIMES`].
fn time(micros: i128) -> OffsetDateTime {
    OffsetDateTime::from_unix_timestamp_nanos(micros * 1_000).unwrap_or(OffsetDateTime::UNIX_EPOCH)
}

/// Where the next page begins: behind this order.
fn encode(place: Place) -> String {
    let micros = place.created_at.unix_timestamp_nanos().div_euclid(1_000);
    let mut bytes = [0; 24];
    bytes[..8].copy_from_slice(&i64::try_from(micros).unwrap_or_default().to_be_bytes());
    bytes[8..].copy_from_slice(place.order_id.as_bytes());
    BASE64_URL_SAFE_NO_PAD.encode(bytes)
}

fn decode(cursor: &str) -> Result<Place, String> {
    let place = || {
        let bytes: [u8; 24] = BASE64_URL_SAFE_NO_PAD.decode(cursor).ok()?.try_into().ok()?;
        let (micros, id) = bytes.split_at(8);
        let micros = i128::from(i64::from_be_bytes(micros.try_into().ok()?));
        let order_id = Uuid::from_slice(id).ok()?;
        TIMES.contains(&micros).then(|| Place { created_at: time(micros), order_id })
    };
    place().ok_or_else(|| "is none of ours: take it as it is from the Link of the page before".to_owned())
}

/// The same question, from there on. What was asked is repeated as it was written.
fn next_link(uri: &Uri, end: Place) -> String {
    let parts = uri.query().unwrap_or_default().split('&').filter(|part| !part.is_empty());
    let is_cursor = |part: &str| percent_decode_str(part.split('=').next().unwrap_or_default()).eq(CURSOR.bytes());
    let mut link = format!("<{}?", uri.path());
    for part in parts.filter(|part| !is_cursor(part)) {
        link.push_str(part);
        link.push('&');
    }
    link + CURSOR + "=" + &encode(end) + ">; rel=\"next\""
}

#[cfg(test)]
mod tests {
    use axum::extract::Query;
    use proptest::prelude::*;

    use super::*;

    fn asked(query: &str) -> Result<Asked, Vec<Violation>> {
        let uri = format!("/orders?{query}").parse().unwrap();
        let (Query(OfAll { user_id }), Query(query)) =
            (Query::try_from_uri(&uri).unwrap(), Query::try_from_uri(&uri).unwrap());
        Asked::parse(user_id, query).map_err(|problem| match problem {
            Problem::Invalid(violations) => violations,
            other => panic!("{other:?}"),
        })
    }

    #[test]
    fn each_bad_parameter_is_named_with_its_remedy() {
        for (query, pointer, says) in [
            ("limit=0", "/limit", "from 1 to 200"),
            ("limit=201", "/limit", "from 1 to 200"),
            ("limit=-1", "/limit", "from 1 to 200"),
            ("limit=ten", "/limit", "from 1 to 200"),
            ("status=", "/status", "empty"),
            ("status", "/status", "empty"),
            ("created_from=yesterday", "/created_from", "RFC 3339"),
            ("created_to=2026-01-31", "/created_to", "RFC 3339"),
            ("created_to=2026-01-31T12:00:00+01:00", "/created_to", "%2B"),
            ("cursor=garbage", "/cursor", "Link"),
            ("cursor=AAAA", "/cursor", "Link"),
            ("cursor=f_________8AAAAAAAAAAAAAAAAAAAAA", "/cursor", "Link"),
        ] {
            let violations = asked(query).unwrap_err();
            let found = violations.iter().any(|one| one.pointer == pointer && one.reason.contains(says));
            assert!(found, "{query}: {violations:?}");
        }
        assert_eq!(asked("limit=0&cursor=x&user_id=").unwrap_err().len(), 3);
    }

    #[test]
    fn a_time_between_two_microseconds_is_the_later_one() {
        let from = |text: &str| asked(&format!("created_from={text}")).unwrap().from;
        assert_eq!(from("2026-01-31T12:00:00.0000001Z"), from("2026-01-31T12:00:00.000001Z"));
        assert_eq!(from("2026-01-31T12:00:00%2B01:00"), from("2026-01-31T11:00:00Z"));
        // Beyond what the database can say there is nothing.
        asked("created_from=0000-01-01T00:00:00Z&created_to=9999-12-31T23:59:59-23:59").unwrap();
    }

    #[test]
    fn the_next_page_is_asked_for_as_this_one_was() {
        let uri: Uri = "/users/%C3%A4/orders?&status=in%20transit&%63ursor=old&limit=3".parse().unwrap();
        let end = Place { created_at: time(1), order_id: Uuid::nil() };
        let link = next_link(&uri, end);
        let next = format!("</users/%C3%A4/orders?status=in%20transit&limit=3&cursor={}>; rel=\"next\"", encode(end));
        assert_eq!(link, next);
    }

    proptest! {
        #[test]
        fn a_cursor_leads_where_it_came_from(micros in TIMES, id: u128) {
            let place = Place { created_at: time(micros), order_id: Uuid::from_u128(id) };
            prop_assert_eq!(decode(&encode(place)), Ok(place));
        }

        #[test]
        fn no_text_is_a_cursor_by_chance_or_harms(text in ".*") {
            if let Ok(place) = decode(&text) {
                prop_assert_eq!(encode(place), text);
            }
        }
    }
}
