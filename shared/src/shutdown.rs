//! The end of a process: the signals that ask for it, and its exit code.

use std::process::ExitCode;

use tokio::{
    runtime::Builder,
    signal::unix::{SignalKind, signal},
};

use crate::output::{READER_GONE, ReaderGone, note};

/// Runs the whole of a process, on so many threads, unless `TOKIO_WORKER_THREADS` says how many. An
/// error is told on stderr.
pub fn run_to_end(threads: usize, work: impl Future<Output = anyhow::Result<()>>) -> ExitCode {
    let is_told = std::env::var_os("TOKIO_WORKER_THREADS").is_some();
    let mut builder = if threads <= 1 && !is_told {
        // Its one queue is served in order. That of several threads keeps the newest 256 tasks at hand
        // and leaves older ones for when those are done: some requests of an overload waited for tenths
        // of a second while thousands that came later were answered.
        Builder::new_current_thread()
    } else {
        Builder::new_multi_thread()
    };
    if !is_told {
        builder.worker_threads(threads.max(1));
    }
    let runtime = match builder.enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            note(&format!("error: cannot start: {error}"));
            return ExitCode::FAILURE;
        }
    };
    let result = runtime.block_on(work);
    // Not waiting for threads that a library keeps: a broker that stands still would hold us here
    // long after our time is up.
    runtime.shutdown_background();
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) if error.is::<ReaderGone>() => ExitCode::from(READER_GONE),
        Err(error) => {
            note(&format!("error: {error:#}"));
            ExitCode::FAILURE
        }
    }
}

/// Resolves on SIGTERM or SIGINT.
///
/// # Errors
/// When the process may not install signal handlers.
pub fn requested() -> std::io::Result<impl Future<Output = ()>> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    Ok(async move {
        let name = tokio::select! {
            _ = terminate.recv() => "SIGTERM",
            _ = interrupt.recv() => "SIGINT",
        };
        tracing::info!(signal = name, "asked to stop");
    })
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use tokio::task::JoinSet;

    use super::*;

    #[test]
    fn of_thousands_of_tasks_on_one_thread_each_has_its_turn_in_order() {
        let turns = Arc::new(Mutex::new(Vec::new()));
        let all = turns.clone();
        run_to_end(1, async move {
            let turn = |task: u32| {
                let all = all.clone();
                async move { all.lock().expect("never poisoned").push(task) }
            };
            (0..2_000).map(turn).collect::<JoinSet<_>>().join_all().await;
            Ok(())
        });
        assert!(turns.lock().expect("never poisoned").iter().copied().eq(0..2_000));
    }
}
