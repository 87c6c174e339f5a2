//! How much memory the process has used. Only Linux says so in a file; elsewhere nothing is known.

use std::fs;

/// The most memory the process has had at a time since [`forget_peak`], in bytes.
pub(crate) fn peak_bytes() -> Option<u64> {
    status("VmHWM:")
}

/// The memory the process has now, in bytes.
pub(crate) fn resident_bytes() -> Option<u64> {
    status("VmRSS:")
}

/// Starts the measurement of the peak anew; returns whether that is possible.
pub(crate) fn forget_peak() -> bool {
    fs::write("/proc/self/clear_refs", "5").is_ok()
}

fn status(field: &str) -> Option<u64> {
    let status = fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix(field))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kib.checked_mul(1024)
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;

    #[test]
    fn the_peak_follows_an_allocation() {
        assert!(forget_peak());
        let before = resident_bytes().unwrap();
        let big = std::hint::black_box(vec![1_u8; 64 << 20]);
        assert!(peak_bytes().unwrap() >= before + (60 << 20));
        drop(big);
    }
}
