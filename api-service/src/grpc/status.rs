//! The one place where a problem becomes a status of gRPC, with google.rpc's details: what is wrong
//! with which field, a reason for programs with the ids that matter, when to try again.

use std::{collections::HashMap, time::Duration};

use serde_json::Value;
use shared::order::Violation;
use tonic::{Code, Status};
use tonic_types::{ErrorDetails, FieldViolation, StatusExt as _};

use crate::error::{Problem, RETRY_AFTER};

const DOMAIN: &str = "orderstream";
/// Details travel as a header, of which many clients take 8 KiB and no more; with a third of it for
/// base64, and the message beside them.
const VIOLATIONS_BYTES: usize = 3 * 1024;
const TEXT_BYTES: usize = 1024;

fn code(problem: &Problem) -> Code {
    match problem {
        Problem::Malformed(_) | Problem::Invalid(_) | Problem::Parameters(_) | Problem::ContentType(_) => {
            Code::InvalidArgument
        }
        Problem::UnknownOrder | Problem::UnknownRequest | Problem::UnknownParked => Code::NotFound,
        Problem::UnknownRoute(_) | Problem::MethodNotAllowed => Code::Unimplemented,
        Problem::Unauthenticated(_) => Code::Unauthenticated,
        Problem::Forbidden(_) => Code::PermissionDenied,
        // As every gRPC library answers a message that is too large for it.
        Problem::TooLarge { .. } | Problem::TooMuchTogether { .. } => Code::ResourceExhausted,
        Problem::TooSlow => Code::DeadlineExceeded,
        Problem::TooMany { .. } => Code::ResourceExhausted,
        Problem::KeyReused => Code::InvalidArgument,
        // What was to be compared has changed, or is not decided: to be tried again from further up.
        Problem::Precondition { .. } | Problem::KeyUndecided { .. } => Code::Aborted,
        Problem::ExternalIdTaken { .. } => Code::AlreadyExists,
        // The same again fails again until the order is another.
        Problem::Deleted { .. }
        | Problem::ContentFixed { .. }
        | Problem::IllegalMove { .. }
        | Problem::ParkedElsewise { .. }
        | Problem::AnotherRefused
        | Problem::Rejected { .. } => Code::FailedPrecondition,
        Problem::Unavailable(_) => Code::Unavailable,
        Problem::Internal => Code::Internal,
    }
}

impl From<Problem> for Status {
    fn from(problem: Problem) -> Self {
        let (_, kind, _) = problem.kind();
        metrics::counter!("orderstream_requests_refused_total", "reason" => kind).increment(1);
        let code = code(&problem);
        let reason = kind.replace('-', "_").to_uppercase();
        let members = problem.members().into_iter().filter_map(|(name, value)| Some((name, short(text(value)?))));
        let mut details = ErrorDetails::with_error_info(reason, DOMAIN, members.collect::<HashMap<_, _>>());
        if let Problem::Invalid(violations) = &problem {
            details.set_bad_request(fields(violations));
        }
        let retry_after = match problem {
            Problem::Unavailable(_) | Problem::KeyUndecided { .. } => Some(RETRY_AFTER),
            Problem::TooMany { retry_after } => Some(retry_after),
            _ => None,
        };
        if let Some(seconds) = retry_after {
            details.set_retry_info(Some(Duration::from_secs(seconds)));
        }
        Self::with_error_details(code, short(problem.sentence()), details)
    }
}

/// `None` for what has a detail of its own.
fn text(member: Value) -> Option<String> {
    match member {
        Value::String(text) => Some(text),
        Value::Number(number) => Some(number.to_string()),
        // The states that would be allowed.
        Value::Array(values) if values.iter().all(Value::is_string) => {
            Some(values.iter().filter_map(Value::as_str).collect::<Vec<_>>().join(","))
        }
        Value::Array(_) | Value::Object(_) | Value::Bool(_) | Value::Null => None,
    }
}

fn fields(violations: &[Violation]) -> Vec<FieldViolation> {
    let mut room = VIOLATIONS_BYTES;
    let told = violations.iter().map_while(|violation| {
        let (field, reason) = (short(field(&violation.pointer)), short(violation.reason.clone()));
        room = room.checked_sub(field.len() + reason.len())?;
        Some(FieldViolation::new(field, reason))
    });
    told.collect()
}

/// A JSON pointer into the body that the message stood for, as a path in the message:
/// `/items/0/unit_price` is `items[0].price`.
fn field(pointer: &str) -> String {
    let mut path = String::new();
    let mut is_item = false;
    for (depth, segment) in pointer.split('/').skip(1).enumerate() {
        let segment = segment.replace("~1", "/").replace("~0", "~");
        is_item |= depth == 0 && segment == "items";
        match segment.as_str() {
            index if depth > 0 && !index.is_empty() && index.bytes().all(|byte| byte.is_ascii_digit()) => {
                path.push_str(&format!("[{index}]"));
            }
            name => {
                if !path.is_empty() {
                    path.push('.');
                }
                path.push_str(match name {
                    "payload" if depth == 0 => "payload_json",
                    "unit_price" if is_item => "price",
                    name => name,
                });
            }
        }
    }
    path
}

fn short(mut text: String) -> String {
    if text.len() > TEXT_BYTES {
        let end = (0..=TEXT_BYTES).rev().find(|&end| text.is_char_boundary(end)).unwrap_or_default();
        text.truncate(end);
        text.push('…');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pointer_becomes_a_path_in_the_message() {
        for (pointer, path) in [
            ("", ""),
            ("/user_id", "user_id"),
            ("/items", "items"),
            ("/items/12/unit_price", "items[12].price"),
            ("/payload/a~1b/0", "payload_json.a/b[0]"),
            ("/payload/unit_price", "payload_json.unit_price"),
        ] {
            assert_eq!(field(pointer), path);
        }
    }

    #[test]
    fn a_status_fits_the_headers_that_clients_take() {
        let violations = (0..5000).map(|n| Violation::new(format!("/items/{n}/quantity"), "ä".repeat(400)));
        let status = Status::from(Problem::Invalid(violations.collect()));
        let size = status.details().len() * 4 / 3 + status.message().len() * 3;
        assert!(size < 8 * 1024, "{size}");
        assert!(!status.get_error_details().bad_request().unwrap().field_violations.is_empty());
    }
}
