//! The thread of the write path. What every order waits for must not wait for its own turn among
//! the thousands of connections whose requests it has to answer: with one runtime for both, each
//! step of a transaction came after all that was ready then, and the more was refused the later.

use anyhow::Context as _;
use tokio::runtime::{Builder, Handle};
use tokio_util::sync::{CancellationToken, DropGuard};

/// Runs what is spawned on its handle for as long as this lives.
pub(crate) struct WritePath {
    handle: Handle,
    _end: DropGuard,
}

impl WritePath {
    /// # Errors
    /// When the machine grants no thread.
    pub(crate) fn start() -> anyhow::Result<Self> {
        let runtime = Builder::new_current_thread().enable_all().build().context("starting the write path")?;
        let (handle, end) = (runtime.handle().clone(), CancellationToken::new());
        let _end = end.clone().drop_guard();
        std::thread::Builder::new()
            .name("write-path".to_owned())
            .spawn(move || runtime.block_on(end.cancelled()))
            .context("starting the write path")?;
        Ok(Self { handle, _end })
    }

    pub(crate) fn handle(&self) -> &Handle {
        &self.handle
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn what_was_spawned_ends_with_it() {
        let path = WritePath::start().unwrap();
        let task = path.handle().spawn(std::future::pending::<()>());
        drop(path);
        assert!(task.await.unwrap_err().is_cancelled());
    }
}
