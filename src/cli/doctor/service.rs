use std::process::Command;

use super::Finding;

/// Whether systemd keeps the guests' listeners while the daemon is restarted.
pub(super) fn descriptor_store() -> Finding {
    let asked = Command::new("systemctl")
        .args(["show", "volcryptd.service", "--property=FileDescriptorStoreMax", "--value"])
        .output();
    match asked {
        Ok(output) => judge(&String::from_utf8_lossy(&output.stdout)),
        Err(error) => Finding::warn(
            "systemd",
            format!("systemctl cannot be run ({error}), so nobody keeps the guests' listeners"),
            "run volcryptd under systemd",
        ),
    }
}

fn judge(value: &str) -> Finding {
    match value.trim().parse::<u32>() {
        Ok(0) => Finding::fail(
            "systemd",
            "it keeps no descriptor of volcryptd's, so a restart of the daemon would cut every guest off",
            "remove FileDescriptorStoreMax=0 from the drop-ins that 'systemctl cat volcryptd' shows",
        ),
        Ok(number) => Finding::ok("systemd", format!("it keeps up to {number} guests' listeners over a restart")),
        Err(_) => Finding::warn(
            "systemd",
            "it does not tell how many descriptors of volcryptd's it keeps",
            "systemctl status volcryptd",
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::super::Verdict;
    use super::*;

    #[test]
    fn a_service_without_a_descriptor_store_fails() {
        assert_eq!(judge("4096\n").verdict(), Verdict::Ok);
        assert_eq!(judge("0\n").verdict(), Verdict::Fail);
        assert_eq!(judge("").verdict(), Verdict::Warn);
    }
}
