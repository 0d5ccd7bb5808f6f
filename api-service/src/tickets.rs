//! Tickets: a page in a browser opens an `EventSource`, which sends no headers, so that who asks has to stand
//! in the URL. URLs are kept in logs and histories; hence no token stands there, but a ticket that is good for
//! one order, for some minutes, and for nothing but watching it.
//!
//! A ticket is a JWT of our own (HS256). Its keys are in the database, where all replicas find the same, and
//! are nobody's to set. They are not those of `AUTH_MODE=jwt`, so that no ticket is a token, and no token a
//! ticket.

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use axum::{extract::Query, http::Uri};
use jsonwebtoken::{
    Algorithm, DecodingKey, EncodingKey, Header, Validation, decode, decode_header, encode, errors::ErrorKind,
};
use serde::{Deserialize, Serialize};
use shared::{
    db::{Db, DbError},
    message::now,
};
use time::OffsetDateTime;
use tokio::time::Instant;
use uuid::Uuid;

use crate::{error::Problem, identity::Caller, store::tickets};

/// An `EventSource` comes back to the same URL when it has lost its connection. So long that goes by itself;
/// then it ends with a 401, and its page asks for another ticket.
const GOOD_FOR: Duration = Duration::from_secs(10 * 60);
/// Clocks differ.
const LEEWAY: Duration = Duration::from_secs(30);
const AUDIENCE: &str = "orderstream-watch";
/// How long keys are used without a look at those of the database.
const FRESH: Duration = Duration::from_secs(60);
/// A ticket of an unknown key may be of a new one. Anybody can make up such tickets, so they are looked for
/// no more often than this.
const PAUSE: Duration = Duration::from_secs(1);

const UNKNOWN: Problem =
    Problem::Unauthenticated("the ticket is none of ours: POST /orders/{order_id}/watch-ticket gives one");
const EXPIRED: Problem =
    Problem::Unauthenticated("the ticket has expired: POST /orders/{order_id}/watch-ticket gives another");
const OF_ANOTHER: Problem = Problem::Unauthenticated("the ticket is for another order: each has tickets of its own");

pub(crate) struct Tickets {
    db: Db,
    known: Mutex<Known>,
}

#[derive(Clone, Default)]
struct Known {
    keys: Arc<Vec<tickets::Key>>,
    read_at: Option<Instant>,
}

/// What a ticket says.
#[derive(Debug, Deserialize, Serialize)]
struct Claims {
    aud: String,
    exp: i64,
    order_id: Uuid,
    caller: Caller,
}

pub(crate) struct Ticket {
    pub text: String,
    pub expires_at: OffsetDateTime,
}

impl Tickets {
    pub(crate) fn new(db: Db) -> Self {
        Self { db, known: Mutex::default() }
    }

    /// Lets this caller watch this order, which it may see.
    pub(crate) async fn issue(&self, order_id: Uuid, caller: &Caller) -> Result<Ticket, Problem> {
        let keys = self.keys(None).await?;
        let expires_at = now() + GOOD_FOR;
        let expires_at = expires_at.replace_nanosecond(0).unwrap_or(expires_at);
        let text = keys.first().and_then(|key| sign(key, order_id, caller, expires_at));
        Ok(Ticket {
            text: text.ok_or(Problem::Unavailable("there is no key to sign tickets with (ticket_keys)"))?,
            expires_at,
        })
    }

    /// Who was given this ticket for this order.
    pub(crate) async fn caller(&self, ticket: &Presented) -> Result<Caller, Problem> {
        let key =
            decode_header(&ticket.text).ok().and_then(|header| Uuid::try_parse(&header.kid?).ok()).ok_or(UNKNOWN)?;
        let keys = self.keys(Some(key)).await?;
        let key = keys.iter().find(|(id, _)| *id == key).ok_or(UNKNOWN)?;
        verify(key, ticket)
    }

    /// The keys; those of the database, if that one is asked for and not known.
    async fn keys(&self, wanted: Option<Uuid>) -> Result<Arc<Vec<tickets::Key>>, DbError> {
        let Known { keys, read_at } = self.known().clone();
        let age = read_at.map(|at| at.elapsed());
        let has_it = wanted.map_or(!keys.is_empty(), |wanted| keys.iter().any(|(id, _)| *id == wanted));
        if age.is_some_and(|age| age < if has_it { FRESH } else { PAUSE }) {
            return Ok(keys);
        }
        let keys = Arc::new(tickets::keys(&self.db).await?);
        *self.known() = Known { keys: keys.clone(), read_at: Some(Instant::now()) };
        Ok(keys)
    }

    fn known(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn sign((id, secret): &tickets::Key, order_id: Uuid, caller: &Caller, expires_at: OffsetDateTime) -> Option<String> {
    let header = Header { kid: Some(id.to_string()), ..Header::new(Algorithm::HS256) };
    let (aud, exp, caller) = (AUDIENCE.to_owned(), expires_at.unix_timestamp(), caller.clone());
    encode(&header, &Claims { aud, exp, order_id, caller }, &EncodingKey::from_secret(secret)).ok()
}

fn verify((_, secret): &tickets::Key, ticket: &Presented) -> Result<Caller, Problem> {
    let mut validation = Validation { leeway: LEEWAY.as_secs(), ..Validation::new(Algorithm::HS256) };
    validation.set_audience(&[AUDIENCE]);
    validation.required_spec_claims.insert("aud".to_owned());
    match decode::<Claims>(&ticket.text, &DecodingKey::from_secret(secret), &validation) {
        Ok(read) if ticket.order_id == Some(read.claims.order_id) => Ok(read.claims.caller),
        Ok(_) => Err(OF_ANOTHER),
        Err(error) if matches!(error.kind(), ErrorKind::ExpiredSignature) => Err(EXPIRED),
        Err(_) => Err(UNKNOWN),
    }
}

/// A ticket as it stands in a URL, and the order that the URL is of.
pub(crate) struct Presented {
    text: String,
    order_id: Option<Uuid>,
}

impl Presented {
    /// `/orders/{order_id}/watch?ticket=…`: nothing else takes tickets.
    pub(crate) fn in_url(uri: &Uri) -> Option<Self> {
        let order_id = uri.path().strip_prefix("/orders/")?.strip_suffix("/watch")?;
        let Query(pairs) = Query::<Vec<(String, String)>>::try_from_uri(uri).ok()?;
        let (_, text) = pairs.into_iter().find(|(name, _)| name == "ticket")?;
        Some(Self { text, order_id: Uuid::try_parse(order_id).ok() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ORDER: Uuid = Uuid::from_u128(7);

    fn key(id: u128, byte: u8) -> tickets::Key {
        (Uuid::from_u128(id), vec![byte; 32])
    }

    fn shown(text: String, order_id: Uuid) -> Presented {
        Presented { text, order_id: Some(order_id) }
    }

    #[test]
    fn a_ticket_is_good_for_one_order_until_it_expires() {
        let caller = Caller::known_as(Some("alice"));
        let later = |seconds: i64| now() + time::Duration::seconds(seconds);
        let ticket = |expires_at| sign(&key(1, 1), ORDER, &caller, expires_at).unwrap();
        assert_eq!(verify(&key(1, 1), &shown(ticket(later(60)), ORDER)).unwrap(), caller);
        let refused = |key: &tickets::Key, ticket: &Presented| match verify(key, ticket) {
            Err(Problem::Unauthenticated(said)) => said,
            other => panic!("{other:?}"),
        };
        assert!(refused(&key(1, 1), &shown(ticket(later(60)), Uuid::nil())).contains("another order"));
        assert!(refused(&key(1, 1), &shown(ticket(later(-60)), ORDER)).contains("expired"));
        assert!(refused(&key(1, 2), &shown(ticket(later(60)), ORDER)).contains("none of ours"));
        let good = ticket(later(60));
        let parts: Vec<&str> = good.split('.').collect();
        let (of_nobody, claims) = (Caller::known_as(None), later(60));
        let others = sign(&key(1, 2), ORDER, &of_nobody, claims).unwrap();
        let forged = [parts[0], others.split('.').nth(1).unwrap(), parts[2]].join(".");
        for bad in [forged, format!("{}.{}.", parts[0], parts[1]), "a.b.c".to_owned(), String::new()] {
            assert!(refused(&key(1, 1), &shown(bad, ORDER)).contains("none of ours"));
        }
    }

    #[test]
    fn only_the_url_that_watches_an_order_takes_a_ticket() {
        let of = |uri: &str| Presented::in_url(&uri.parse().unwrap()).map(|ticket| (ticket.text, ticket.order_id));
        let id = "00000000-0000-0000-0000-000000000007";
        assert_eq!(
            of(&format!("/orders/{id}/watch?last_event_id=1&ticket=a%2Eb")),
            Some(("a.b".to_owned(), Some(ORDER)))
        );
        assert_eq!(of("/orders/17/watch?ticket=t"), Some(("t".to_owned(), None)));
        for other in [
            "/orders/17/watch",
            "/orders/17/watch?tickets=t",
            "/orders/17?ticket=t",
            "/orders?ticket=t",
            "/api/orders/17/watch?ticket=t",
        ] {
            assert_eq!(of(other), None, "{other}");
        }
    }
}
