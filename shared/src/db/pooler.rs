//! A pooler between us and PostgreSQL that gives each transaction another session (PgBouncer's
//! `pool_mode = transaction`, or `statement`). What we set in a session, and the statements that we prepare
//! there, would be gone with the next transaction, and harm whoever has the session then.

use std::{sync::atomic::Ordering, time::Duration};

use tokio_postgres::{Client, SimpleQueryMessage};

use super::{ConnectError, Manager};

/// Others may use the pooler between our two questions.
const ROUNDS: usize = 5;
/// A pooler without a session to spare lets the second client wait: it keeps one for the first.
const PATIENCE: Duration = Duration::from_secs(1);

impl Manager {
    /// Two clients at the same time that find themselves in one session share it, and one that finds
    /// itself in another than before has none of its own. Where that cannot be found out now, the next
    /// connection asks.
    pub(super) async fn refuse_shared_sessions(&self, client: &Client) -> Result<(), ConnectError> {
        let is_shared = async {
            let second = self.bare_client().await.ok()?;
            let first = (session(client).await?, session(&second).await?);
            for _ in 1..ROUNDS {
                // A pooler gives the session that was left last, or that was left first.
                let both = (session(client).await?, session(&second).await?);
                if both.0 == both.1 || both != first {
                    return Some(true);
                }
            }
            Some(first.0 == first.1)
        };
        match tokio::time::timeout(PATIENCE, is_shared).await {
            Ok(Some(true)) => return Err(ConnectError::Pooled { server: self.server.clone() }),
            Ok(Some(false)) => self.are_ours.store(true, Ordering::Relaxed),
            Ok(None) | Err(_) => {}
        }
        Ok(())
    }
}

/// The server's process. None where it does not say: whoever uses the connection next hears why.
async fn session(client: &Client) -> Option<String> {
    let said = client.simple_query("select pg_backend_pid()").await.ok()?;
    said.iter().find_map(|message| match message {
        SimpleQueryMessage::Row(row) => row.get(0).map(ToOwned::to_owned),
        _ => None,
    })
}
