//! Who runs beside whom. Tests that put load on the machine, or that measure time, would see each
//! other's noise on two cores; the rest may share.

use tokio::sync::{Semaphore, SemaphorePermit};

/// As many ordinary tests as run at once; one that needs the machine takes all of them.
const PLACES: u32 = 8;

static MACHINE: Semaphore = Semaphore::const_new(PLACES as usize);

/// Held for the length of a test.
#[must_use = "the turn ends when this is dropped"]
pub struct Turn {
    _permit: SemaphorePermit<'static>,
}

/// For a test that loads the machine or measures time: nothing else of this binary runs.
pub async fn alone() -> Turn {
    take(PLACES).await
}

/// For every other test: runs beside its like, never beside one that asked to be alone.
pub async fn beside_others() -> Turn {
    take(1).await
}

async fn take(places: u32) -> Turn {
    let permit = MACHINE.acquire_many(places).await.expect("the semaphore is never closed");
    Turn { _permit: permit }
}
