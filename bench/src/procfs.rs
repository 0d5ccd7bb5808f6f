//! What Linux says of processes and of the machine.

use std::time::Duration;

use anyhow::Context;

/// The unit of CPU times in /proc: USER_HZ, which is 100 wherever Linux runs today.
const TICKS_PER_SECOND: f64 = 100.0;

/// Resident memory (VmRSS).
pub fn resident_kib(pid: u32) -> anyhow::Result<u64> {
    let status = read(&format!("/proc/{pid}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).context("no VmRSS")?;
    line.trim().trim_end_matches("kB").trim().parse().context("VmRSS")
}

/// User and system time of a process since it began.
pub fn cpu_time(pid: u32) -> anyhow::Result<Duration> {
    let stat = stat_fields(pid)?;
    ticks(stat.split_whitespace().skip(UTIME).take(2))
}

/// The same of a process and all children it ever had: PostgreSQL has one per connection.
pub fn family_cpu_time(parent: u32) -> anyhow::Result<Duration> {
    let stat = stat_fields(parent)?;
    // Its own two, and the two of the children that have ended.
    let mut sum = ticks(stat.split_whitespace().skip(UTIME).take(4))?;
    for entry in std::fs::read_dir("/proc").context("reading /proc")? {
        let Ok(name) = entry?.file_name().into_string() else { continue };
        let Ok(pid) = name.parse() else { continue };
        // A process may end while this looks at it; its parent then has its time.
        if parent_of(pid).is_ok_and(|found| found == parent) {
            sum += cpu_time(pid).unwrap_or_default();
        }
    }
    Ok(sum)
}

pub fn parent_of(pid: u32) -> anyhow::Result<u32> {
    let stat = stat_fields(pid)?;
    let parent = stat.split_whitespace().nth(1).context("no parent in stat")?;
    parent.parse().context("the parent in stat")
}

/// What a process shows as its command line.
pub fn command_line(pid: u32) -> anyhow::Result<String> {
    read(&format!("/proc/{pid}/cmdline"))
}

/// Time that all cores together were busy since the machine started.
pub fn machine_busy() -> anyhow::Result<Duration> {
    let stat = read("/proc/stat")?;
    let line = stat.lines().next().context("an empty /proc/stat")?;
    // user, nice, system, idle, iowait, irq, softirq, steal: all but the two in the middle.
    let fields = line.split_whitespace().skip(1).take(8).enumerate();
    ticks(fields.filter(|(index, _)| !matches!(index, 3 | 4)).map(|(_, field)| field))
}

/// Where the CPU times begin in what `stat_fields` gives.
const UTIME: usize = 11;

/// The name, in parentheses, may hold anything, so counting starts after it.
fn stat_fields(pid: u32) -> anyhow::Result<String> {
    let stat = read(&format!("/proc/{pid}/stat"))?;
    let (_, fields) = stat.rsplit_once(')').context("no name in stat")?;
    Ok(fields.to_owned())
}

fn ticks<'a>(fields: impl Iterator<Item = &'a str>) -> anyhow::Result<Duration> {
    let mut sum = 0_u64;
    for field in fields {
        sum += field.parse::<u64>().with_context(|| format!("{field:?} is no CPU time"))?;
    }
    Ok(Duration::from_secs_f64(sum as f64 / TICKS_PER_SECOND))
}

fn read(path: &str) -> anyhow::Result<String> {
    std::fs::read_to_string(path).with_context(|| format!("reading {path}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_process_and_this_machine_can_be_read() {
        let me = std::process::id();
        assert!(resident_kib(me).expect("memory") > 100);
        let busy = machine_busy().expect("machine");
        let (own, family) = (cpu_time(me).expect("cpu"), family_cpu_time(me).expect("family"));
        assert!(own <= family && own <= busy, "{own:?}, {family:?}, {busy:?}");
        assert!(command_line(parent_of(me).expect("a parent")).is_ok());
    }
}
