//! Waiting for a state: a deadline, and the last state in the message when it does not come.

use std::future::Future;
use std::time::Duration;

use tokio::time::Instant;

/// What most conditions get: long enough for a loaded machine, short enough to be noticed.
const USUAL_DEADLINE: Duration = Duration::from_secs(30);

/// Short, since each round only looks; the tests' own load matters more.
const PAUSE_BETWEEN_LOOKS: Duration = Duration::from_millis(20);

/// Looks until `condition` returns `Ok`, and gives what it found. Panics at the deadline, saying
/// what was waited for and what `condition` last said instead.
pub async fn wait_for<T, Fut>(what: &str, deadline: Duration, mut condition: impl FnMut() -> Fut) -> T
where
    Fut: Future<Output = Result<T, String>>,
{
    let end = Instant::now() + deadline;
    let mut last_state = "nothing seen yet: the first look did not return".to_owned();
    loop {
        // A look that hangs (a frozen proxy, a stopped server) must not outlive the deadline.
        match tokio::time::timeout_at(end, condition()).await {
            Ok(Ok(found)) => return found,
            Ok(Err(state)) => last_state = state,
            Err(_) => last_state = format!("the last look did not return; before it: {last_state}"),
        }
        assert!(Instant::now() < end, "waited {deadline:?} for: {what}\nlast state: {last_state}");
        tokio::time::sleep(PAUSE_BETWEEN_LOOKS).await;
    }
}

/// [`wait_for`] with the usual deadline.
pub async fn eventually<T, Fut>(what: &str, condition: impl FnMut() -> Fut) -> T
where
    Fut: Future<Output = Result<T, String>>,
{
    wait_for(what, USUAL_DEADLINE, condition).await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn gives_what_the_condition_found() {
        let mut looks = 0;
        let found = eventually("the third look", || {
            looks += 1;
            let look = looks;
            async move { if look == 3 { Ok(look) } else { Err(look.to_string()) } }
        })
        .await;
        assert_eq!(found, 3);
    }

    #[tokio::test]
    #[should_panic(expected = "last state: still 7 rows")]
    async fn says_the_last_state_when_time_is_up() {
        wait_for::<(), _>("no rows", Duration::from_millis(30), || async { Err("still 7 rows".to_owned()) }).await;
    }

    #[tokio::test]
    #[should_panic(expected = "waited 30ms for: an answer")]
    async fn a_look_that_hangs_does_not_outlive_the_deadline() {
        wait_for::<(), _>("an answer", Duration::from_millis(30), std::future::pending).await;
    }
}
