//! Who calls, and whose orders that caller may see and change (`AUTH_MODE`). Knows headers only:
//! HTTP has them, and gRPC's metadata are the same.

pub(crate) mod token;

use std::sync::Arc;

use axum::http::{HeaderMap, HeaderName, header};
use serde::{Deserialize, Serialize};
use shared::order::MAX_ID;

use crate::error::Problem;
use token::Tokens;

const USER_ID: HeaderName = HeaderName::from_static("x-user-id");
const USER_ROLE: HeaderName = HeaderName::from_static("x-user-role");

/// How it is known who calls.
#[derive(Clone)]
pub(crate) enum Identity {
    /// Callers are trusted: bodies name the user, `X-User-Id` narrows to one.
    None,
    /// A gateway before us has made sure of `X-User-Id` and `X-User-Role`.
    Header,
    /// `Authorization: Bearer` with a signed token.
    Jwt(Arc<Tokens>),
}

/// Somebody who makes a request. In this form, too, within a ticket.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
pub(crate) struct Caller {
    /// Whom it says it is; without an identity perhaps nobody.
    user: Option<String>,
    /// Crosses users, and sets any status.
    is_service: bool,
}

impl Identity {
    /// Who makes the request with these headers.
    pub(crate) fn caller(&self, headers: &HeaderMap) -> Result<Caller, Problem> {
        match self {
            Self::None => {
                let user = text(headers, &USER_ID)?;
                Ok(Caller { user: user.map(ToOwned::to_owned), is_service: user.is_none() })
            }
            Self::Header => {
                let user = text(headers, &USER_ID)?.filter(|user| is_user_id(user));
                let user = user.ok_or(Problem::Unauthenticated(
                    "the header X-User-Id is missing, or is no user id (1 to 255 characters)",
                ))?;
                let role = text(headers, &USER_ROLE)?;
                // Several roles are a list, as HTTP has it.
                let is_service =
                    role.is_some_and(|roles| roles.split(',').any(|role| is_service(role.trim_matches([' ', '\t']))));
                Ok(Caller { user: Some(user.to_owned()), is_service })
            }
            Self::Jwt(tokens) => {
                let mut given = headers.get_all(header::AUTHORIZATION).iter();
                let (Some(value), None) = (given.next(), given.next()) else {
                    return Err(Problem::Unauthenticated("send Authorization: Bearer with a token"));
                };
                let token = value.to_str().ok().and_then(bearer);
                let token = token.ok_or(Problem::Unauthenticated("Authorization must be Bearer with a token"))?;
                let claims = tokens.verify(token).map_err(Problem::Unauthenticated)?;
                let user = Some(claims.sub).filter(|user| is_user_id(user));
                let user = user.ok_or(Problem::Unauthenticated("the token's sub is no user id"))?;
                Ok(Caller { user: Some(user), is_service: claims.roles.iter().any(|role| is_service(role)) })
            }
        }
    }

    /// Whether a caller without a role may set an order's status by hand.
    pub(crate) fn lets_users_set_status(&self) -> bool {
        matches!(self, Self::None)
    }
}

impl Caller {
    /// Whom it says it is.
    pub(crate) fn user(&self) -> Option<&str> {
        self.user.as_deref()
    }

    /// The one user whose orders it may see; `None`: all.
    pub(crate) fn only(&self) -> Option<&str> {
        self.user.as_deref().filter(|_| !self.is_service)
    }

    /// May it see this user's orders? Those of others do not exist for it.
    pub(crate) fn sees(&self, user_id: &str) -> bool {
        self.only().is_none_or(|only| only == user_id)
    }

    pub(crate) fn is_service(&self) -> bool {
        self.is_service
    }

    #[cfg(test)]
    pub(crate) fn known_as(user: Option<&str>) -> Self {
        Self { user: user.map(ToOwned::to_owned), is_service: user.is_none() }
    }
}

fn is_service(role: &str) -> bool {
    matches!(role, "service" | "admin")
}

fn is_user_id(user: &str) -> bool {
    !user.is_empty() && user.chars().count() <= MAX_ID && !user.contains('\0')
}

/// The token of `Bearer …` (RFC 6750; the scheme's case does not matter).
fn bearer(value: &str) -> Option<&str> {
    let (scheme, token) = value.split_once(' ')?;
    scheme.eq_ignore_ascii_case("bearer").then(|| token.trim()).filter(|token| !token.is_empty())
}

/// A header that may be there once, without the blanks around it (RFC 9110, section 5.5): other white
/// space is part of a name, and without it the name would be somebody else's. Twice would let each
/// who reads it choose another.
fn text<'a>(headers: &'a HeaderMap, name: &HeaderName) -> Result<Option<&'a str>, Problem> {
    let mut values = headers.get_all(name).iter();
    let Some(value) = values.next() else { return Ok(None) };
    if values.next().is_some() {
        return Err(Problem::Malformed(format!("the header {name} is given twice")));
    }
    match std::str::from_utf8(value.as_bytes()) {
        Ok(text) => Ok(Some(text.trim_matches([' ', '\t']))),
        Err(_) => Err(Problem::Malformed(format!("the header {name} is not UTF-8"))),
    }
}

#[cfg(test)]
mod tests {
    use axum::http::HeaderValue;

    use super::*;

    fn headers(pairs: &[(&'static str, &'static str)]) -> HeaderMap {
        let mut headers = HeaderMap::new();
        for (name, value) in pairs {
            headers.append(*name, HeaderValue::from_bytes(value.as_bytes()).unwrap());
        }
        headers
    }

    #[test]
    fn without_an_identity_a_header_narrows_to_one_user() {
        let caller = Identity::None.caller(&headers(&[])).unwrap();
        assert!(caller.sees("a") && caller.only().is_none() && caller.user().is_none());
        let caller = Identity::None.caller(&headers(&[("x-user-id", " a "), ("x-user-role", "admin")])).unwrap();
        assert!(caller.sees("a") && !caller.sees("b"));
    }

    #[test]
    fn behind_a_gateway_a_user_is_asked_for_and_roles_cross_users() {
        for none in [&[][..], &[("x-user-id", " ")], &[("x-user-role", "admin")]] {
            assert!(matches!(Identity::Header.caller(&headers(none)), Err(Problem::Unauthenticated(_))), "{none:?}");
        }
        let of = |role| Identity::Header.caller(&headers(&[("x-user-id", "a"), ("x-user-role", role)])).unwrap();
        for role in ["service", "admin", "admin,service", "user, service", "service ,user"] {
            assert!(of(role).sees("b") && of(role).user() == Some("a"));
        }
        for role in ["", "user", "Admin", "admin\u{a0}", "user,", "user service", "user;admin", "myadmin,user"] {
            assert!(!of(role).sees("b") && of(role).sees("a"));
        }
    }

    #[test]
    fn only_blanks_around_a_name_are_none_of_it() {
        for other in ["a\u{a0}", "\u{3000}a", "a\u{85}", "\u{2003}a"] {
            let mut headers = HeaderMap::new();
            headers.insert("x-user-id", HeaderValue::from_bytes(other.as_bytes()).unwrap());
            for identity in [Identity::None, Identity::Header] {
                let caller = identity.caller(&headers).unwrap();
                assert!(!caller.sees("a") && caller.user() == Some(other), "{other:?}");
            }
        }
    }

    #[test]
    fn a_header_that_is_given_twice_names_nobody() {
        for name in ["x-user-id", "x-user-role"] {
            let twice = headers(&[("x-user-id", "a"), (name, "a"), (name, "service")]);
            assert!(matches!(Identity::Header.caller(&twice), Err(Problem::Malformed(_))));
        }
    }

    #[test]
    fn only_a_bearers_token_is_one() {
        assert_eq!(bearer("Bearer abc"), Some("abc"));
        assert_eq!(bearer("bearer  abc "), Some("abc"));
        for other in ["Basic abc", "Bearer", "Bearer ", "abc", ""] {
            assert_eq!(bearer(other), None, "{other}");
        }
    }
}
