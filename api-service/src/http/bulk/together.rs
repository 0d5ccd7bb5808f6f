//! `policy=reject-all`: all lines of a request are stored, or none.

use axum::{
    body::Body,
    http::{HeaderMap, StatusCode},
    response::Response,
};
use futures_util::stream;
use shared::order::Violation;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use super::{
    super::{
        App, BODY_TIMEOUT,
        orders::{read_body, trace},
    },
    Item, Place, answer, no_body, parse, size,
};
use crate::{
    error::Problem,
    identity::Caller,
    request::{NewOrder, Upsert},
    writer::Stored,
};

/// What can be stored all or nothing: it is held as a whole, and other writers may wait for it.
const LINES: usize = 10_000;
const BYTES: usize = 16 * 1024 * 1024;
/// What broken rules are kept of such a request, in bytes; beyond that, the beginning of one of each
/// line.
const ERRORS: usize = 1024 * 1024;
const BEGINNING: usize = 64;

/// All lines or none.
pub(super) async fn together(
    app: &App,
    caller: &Caller,
    headers: &HeaderMap,
    body: Body,
    place: Place,
) -> Result<Response, Problem> {
    const TOO_MUCH: Problem = Problem::TooMuchTogether { lines: LINES, bytes: BYTES };
    let turn = timeout(BODY_TIMEOUT, app.bulk_places.together.clone().acquire_owned()).await;
    let Ok(Ok(turn)) = turn else {
        return Err(Problem::Unavailable("too many bulk requests with policy=reject-all at once"));
    };
    let whole = read_body(headers, body, BYTES, &app.body_room).await.map_err(|problem| match problem {
        Problem::TooLarge { .. } => TOO_MUCH,
        other => other,
    })?;
    if whole.bytes.is_empty() {
        return Err(no_body());
    }
    let mut parsed: Vec<(u64, Result<Box<NewOrder>, Problem>)> = Vec::new();
    let mut errors = 0;
    for (line, number) in whole.bytes.split(|byte| *byte == b'\n').zip(1..) {
        if line.trim_ascii().is_empty() {
            continue;
        }
        if parsed.len() == LINES {
            return Err(TOO_MUCH);
        }
        let mut order = if line.len() > app.max_body_bytes {
            Err(Problem::TooLarge { limit: app.max_body_bytes })
        } else {
            parse(line, caller, app).and_then(only_new)
        };
        if let Err(problem) = &mut order {
            if errors > ERRORS {
                shorten(problem);
            }
            errors += size(problem);
        }
        parsed.push((number, order));
        if number % 256 == 0 {
            tokio::task::yield_now().await;
        }
    }
    drop(whole);

    let (numbers, orders): (Vec<u64>, Vec<_>) = parsed.into_iter().unzip();
    let orders = match orders.iter().any(Result::is_err) {
        true => {
            let refused = orders.into_iter().map(|order| Err(order.err().unwrap_or(Problem::AnotherRefused)));
            // Whoever comes next need not wait until all of it is read.
            drop(turn);
            return Ok(render(app, numbers, refused.collect(), place));
        }
        false => orders.into_iter().flatten().map(|order| *order).collect(),
    };
    let results = app.orders.create_together(orders, &trace(headers)).await?;
    drop(turn);
    Ok(render(app, numbers, results, place))
}

/// To the beginning of its first reason.
fn shorten(problem: &mut Problem) {
    let beginning = |text: &mut String| {
        if let Some((end, _)) = text.char_indices().nth(BEGINNING) {
            text.truncate(end);
            text.push('…');
            text.shrink_to_fit();
        }
    };
    match problem {
        Problem::Invalid(violations) => {
            violations.truncate(1);
            violations.shrink_to_fit();
            for violation in violations {
                beginning(&mut violation.pointer);
                beginning(&mut violation.reason);
            }
        }
        Problem::Malformed(detail) => beginning(detail),
        _ => {}
    }
}

fn only_new(upsert: Upsert) -> Result<Box<NewOrder>, Problem> {
    match upsert {
        Upsert::Create(order) => Ok(Box::new(order)),
        Upsert::Update(_) | Upsert::Delete(_) => {
            Err(Problem::Invalid(vec![Violation::new("/order_id", "with policy=reject-all only new orders are taken")]))
        }
    }
}

/// As the lines of all others; that nothing was stored is also said by the status, which is known
/// before anything is sent.
fn render(app: &App, lines: Vec<u64>, results: Vec<Result<Stored, Problem>>, held: impl Send + 'static) -> Response {
    let refused = results.iter().any(Result::is_err);
    let status = if refused { StatusCode::UNPROCESSABLE_ENTITY } else { StatusCode::OK };
    let items = lines.into_iter().zip(results).map(|(line, result)| match result {
        Ok(stored) => Item::Stored { line, stored },
        Err(problem) => Item::Refused { line, problem, _room: None },
    });
    let items = stream::iter(items.chain([Item::End(None)]));
    answer(app.clone(), status, items, CancellationToken::new(), held)
}
