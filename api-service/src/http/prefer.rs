//! The `Prefer` header (RFC 7240): how long a caller wants to wait.

use std::time::Duration;

use axum::http::{HeaderMap, HeaderName, HeaderValue};

use crate::orders::WaitLimits;

pub(crate) const PREFERENCE_APPLIED: HeaderName = HeaderName::from_static("preference-applied");

/// What is done about waiting, and how that is said when the caller had asked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Preference {
    /// `None` does not wait.
    pub wait: Option<Duration>,
    pub applied: Option<HeaderValue>,
}

/// Reads `Prefer`. What it does not understand it ignores, as the RFC asks; of several, the first
/// that counts.
pub(crate) fn preference(headers: &HeaderMap, limits: WaitLimits) -> Preference {
    let values = headers.get_all("prefer").iter().filter_map(|value| value.to_str().ok());
    for token in values.flat_map(|value| value.split(',')).filter_map(|token| token.split(';').next()) {
        let (name, value) = token.split_once('=').unwrap_or((token, ""));
        let value = value.trim().trim_matches('"');
        if name.trim().eq_ignore_ascii_case("respond-async") {
            return Preference { wait: None, applied: Some(HeaderValue::from_static("respond-async")) };
        }
        if name.trim().eq_ignore_ascii_case("wait")
            && let Ok(seconds) = value.parse::<u32>()
        {
            let wait = Duration::from_secs(u64::from(seconds)).min(limits.max);
            let applied = format!("wait={}", wait.as_secs());
            return Preference {
                wait: (!wait.is_zero()).then_some(wait),
                applied: HeaderValue::try_from(applied).ok(),
            };
        }
    }
    let wait = limits.default.min(limits.max);
    Preference { wait: (!wait.is_zero()).then_some(wait), applied: None }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(values: &[&str]) -> (Option<u64>, Option<String>) {
        let mut headers = HeaderMap::new();
        for value in values {
            headers.append("prefer", HeaderValue::from_str(value).unwrap());
        }
        let limits = WaitLimits { default: Duration::from_secs(5), max: Duration::from_secs(30) };
        let preference = preference(&headers, limits);
        let applied = preference.applied.map(|value| value.to_str().unwrap().to_owned());
        (preference.wait.map(|wait| wait.as_secs()), applied)
    }

    #[test]
    fn a_caller_says_how_long_it_waits() {
        let applied = |text: &str| Some(text.to_owned());
        assert_eq!(of(&[]), (Some(5), None));
        assert_eq!(of(&["wait=10"]), (Some(10), applied("wait=10")));
        assert_eq!(of(&["handling=lenient, Wait = \"3\"; x=y"]), (Some(3), applied("wait=3")));
        assert_eq!(of(&["wait=9999999"]), (Some(30), applied("wait=30")));
        assert_eq!(of(&["wait=0"]), (None, applied("wait=0")));
        assert_eq!(of(&["return=minimal", "respond-async"]), (None, applied("respond-async")));
        assert_eq!(of(&["wait=soon", "wait=-1", "nonsense"]), (Some(5), None));
    }
}
