//! Turns decide which tests run side by side. Tests that load the machine, or measure time, would see
//! each other's noise on two cores; the rest may share. `deploy/test` starts all tests at once, each on a
//! thread of its own, and they take turns here.

use std::fs::{File, OpenOptions};
use std::io::Write as _;
use std::sync::{LazyLock, Mutex, PoisonError};

use tokio::sync::Notify;
use tokio::time::Instant;

/// The number of ordinary tests that run at once. Eight keep two cores busy: each test waits for a
/// disk, a broker or a deadline most of its time.
const PLACES: usize = 8;

static MACHINE: Mutex<Machine> = Mutex::new(Machine { taken: 0, waiting: [0; 5] });
static CHANGED: Notify = Notify::const_new();

struct Machine {
    /// Places.
    taken: usize,
    /// Tests, by their kind.
    waiting: [usize; 5],
}

/// In the order in which they run: as long as those of few places wait, no place stays empty.
#[derive(Clone, Copy, Debug)]
enum Kind {
    Long,
    Ordinary,
    LongBesideFew,
    BesideFew,
    Alone,
}

impl Kind {
    fn places(self) -> usize {
        match self {
            Self::Long | Self::Ordinary => 1,
            Self::LongBesideFew | Self::BesideFew => PLACES / 4,
            Self::Alone => PLACES,
        }
    }
}

/// Held for the length of a test.
#[must_use = "the turn ends when this is dropped"]
pub struct Turn {
    kind: Kind,
    test: String,
    began: Instant,
}

/// For a test that loads the machine or measures time closely: nothing else of this binary runs.
pub async fn alone() -> Turn {
    take(Kind::Alone).await
}

/// For a test that loads the machine now and then, or measures time in seconds: runs beside three of
/// its like.
pub async fn beside_few() -> Turn {
    take(Kind::BesideFew).await
}

/// For a test that takes half a minute or more, and else fits [`beside_few`]: begins before those.
pub async fn long_beside_few() -> Turn {
    take(Kind::LongBesideFew).await
}

/// For every other test: runs beside its like, never beside one that asked to be alone.
pub async fn beside_others() -> Turn {
    take(Kind::Ordinary).await
}

/// For a test that takes half a minute or more, most of it waiting: begins before those of
/// [`beside_others`], so that it does not run on when they are done.
pub async fn long_beside_others() -> Turn {
    take(Kind::Long).await
}

async fn take(kind: Kind) -> Turn {
    machine(|machine| machine.waiting[kind as usize] += 1);
    loop {
        // Before the look: what changes after it is heard of.
        let mut changed = std::pin::pin!(CHANGED.notified());
        changed.as_mut().enable();
        if machine(|machine| machine.admits(kind)) {
            break;
        }
        changed.await;
    }
    // Others may fit beside it.
    CHANGED.notify_waiters();
    // libtest names the thread for its test.
    let test = std::thread::current().name().unwrap_or("?").to_owned();
    record(format_args!("begun {test}"));
    Turn { kind, test, began: Instant::now() }
}

impl Machine {
    fn admits(&mut self, kind: Kind) -> bool {
        let before = &self.waiting[..kind as usize];
        let admitted = self.taken + kind.places() <= PLACES && before.iter().all(|waiting| *waiting == 0);
        if admitted {
            self.waiting[kind as usize] -= 1;
            self.taken += kind.places();
        }
        admitted
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        record(format_args!("ended {:.1} {}", self.began.elapsed().as_secs_f64(), self.test));
        machine(|machine| machine.taken -= self.kind.places());
        CHANGED.notify_waiters();
    }
}

fn machine<T>(change: impl FnOnce(&mut Machine) -> T) -> T {
    change(&mut MACHINE.lock().unwrap_or_else(PoisonError::into_inner))
}

/// A line for `deploy/test`, which tells the slowest tests from it.
fn record(line: std::fmt::Arguments<'_>) {
    static FILE: LazyLock<Option<File>> = LazyLock::new(|| {
        let path = std::env::var_os("TEST_TIMES")?;
        OpenOptions::new().append(true).create(true).open(path).ok()
    });
    if let Some(mut file) = FILE.as_ref() {
        // In one piece: others write too.
        let _ = file.write_all(format!("{line}\n").as_bytes());
    }
}
