//! What becomes of one open, on a thread that may wait.

use std::borrow::Cow;
use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;

use rustix::fs::OFlags;
use rustix::io::Errno;

use super::{Open, Server, settle};
use crate::audit::Kind;
use crate::daemon::auditing::with_source;
use crate::daemon::broker::{self, Doubt, Verdict};
use crate::domain::Requester;
use crate::guest::{Located, Node, Written, locate, written_file};
use crate::refusal::{Reason, Refusal};

/// What an open was judged to be.
enum Judged {
    Verdict(Verdict),
    /// More has to be looked up to tell whether it may be let through.
    Doubtful(Doubt),
}

impl Server {
    /// Decides on `open`.
    pub(super) fn decide(self: &Arc<Self>, open: Open) {
        let node = match locate(open.call.tid, &open.request, true) {
            Located::NoVolume if open.guest.may_have_volumes() => return self.decide_file(open),
            Located::NoVolume => return open.let_through(),
            Located::Refused(errno) => {
                if errno == Errno::ACCESS {
                    let (guest, path) = (&open.guest, open.path());
                    tracing::error!(
                        pid = guest.pid(),
                        "{guest} was refused {path:?}: neither root nor its own user may look there (a FUSE file system needs \
                         the option allow_other)"
                    );
                }
                return open.refuse(errno.raw_os_error());
            }
            Located::WouldWait => return open.refuse(libc::EAGAIN),
            Located::Device(node) => node,
            Located::Unknown(error) => return open.refuse_unknown(&error),
        };
        // What was read of the thread's files means nothing if it was another thread's by then.
        if open.is_waiting() {
            let requester = self.broker.guest(open.call.tid);
            let judged = open.guest.asker().ask(|| self.judge(&open, &requester, &node));
            self.conclude(open, &requester, judged, Some(node));
        }
    }

    /// Decides on what is no device, for a guest that may have a protected volume.
    fn decide_file(self: &Arc<Self>, open: Open) {
        let file = match written_file(open.call.tid, &open.request) {
            Ok(Some(file)) => file,
            Ok(None) => return open.let_through(),
            Err(error) => return open.refuse_unknown(&error),
        };
        if open.is_waiting() {
            let requester = self.broker.guest(open.call.tid);
            let judged = open.guest.asker().ask(|| self.judge_written(Written::File(file), &requester));
            self.conclude(open, &requester, judged, None);
        }
    }

    fn judge(&self, open: &Open, requester: &broker::Guest<'_>, node: &Node) -> Result<Judged, Refusal> {
        // A mere handle reads and writes nothing, and opening it for real comes by here again.
        if open.request.is_path_only() {
            return Ok(Judged::Verdict(Verdict::LetThrough));
        }
        if node.passes_commands {
            return self.broker.pass_commands(node.device, requester).map(Judged::Verdict);
        }
        let verdict = self.judge_device(open, requester, node)?;
        if matches!(verdict, Verdict::LetThrough) && open.request.writes() && open.guest.may_have_volumes() {
            return self.judge_written(Written::Device(node.device), requester);
        }
        Ok(Judged::Verdict(verdict))
    }

    fn judge_device(&self, open: &Open, requester: &broker::Guest<'_>, node: &Node) -> Result<Verdict, Refusal> {
        self.broker.open(node.device, node.permitted, open.request.device_flags(), requester)
    }

    fn judge_written(&self, written: Written, requester: &broker::Guest<'_>) -> Result<Judged, Refusal> {
        let doubt = self.broker.check_written(written, requester)?;
        Ok(doubt.map_or(Judged::Verdict(Verdict::LetThrough), Judged::Doubtful))
    }

    /// Answers the open as it was judged, or has looked up what is missing for that. `node` is the device's, if it is one.
    fn conclude(
        self: &Arc<Self>,
        open: Open,
        requester: &broker::Guest<'_>,
        judged: Result<Judged, Refusal>,
        node: Option<Node>,
    ) {
        let outcome = match judged {
            Ok(Judged::Doubtful(doubt)) => {
                let turns = Arc::clone(open.guest.lookups());
                return self
                    .at_its_turn(&turns, open, move |server, open| server.look_up(&open, &doubt, node.as_ref()));
            }
            Ok(Judged::Verdict(verdict)) => Ok(verdict),
            Err(refusal) => Err(refusal),
        };
        self.carry_out(outcome, &open, requester);
    }

    /// Decides on `open` by looking up what was left in doubt.
    fn look_up(&self, open: &Open, doubt: &Doubt, node: Option<&Node>) {
        let requester = self.broker.guest(open.call.tid);
        let look_up = || {
            self.broker.look_up_written(doubt, &requester)?;
            match node {
                // That may have taken long: the number may be another device's by now.
                Some(node) => self.judge_device(open, &requester, node),
                None => Ok(Verdict::LetThrough),
            }
        };
        let outcome = open.guest.asker().ask(look_up);
        self.carry_out(outcome, open, &requester);
    }

    /// Answers the open as it was judged.
    fn carry_out(&self, outcome: Result<Verdict, Refusal>, open: &Open, requester: &broker::Guest<'_>) {
        if matches!(outcome, Ok(Verdict::LetThrough)) {
            return open.let_through();
        }
        // Where a volume is concerned it counts which domain asks.
        open.guest.asker().known_as(requester.facts()).ask(|| self.carry_out_as(outcome, open));
    }

    fn carry_out_as(&self, outcome: Result<Verdict, Refusal>, open: &Open) {
        let (guest, listener, path) = (&open.guest, open.guest.listener(), open.path());
        match outcome.and_then(|verdict| self.record(verdict, open)) {
            Ok(Verdict::LetThrough) => open.let_through(),
            Ok(Verdict::OnMapping) => {
                guest.takes_volume();
                open.let_through();
            }
            Ok(Verdict::Mapping(volume, mapping, _) | Verdict::Named(volume, mapping)) => {
                guest.takes_volume();
                let close_on_exec = open.request.flags.contains(OFlags::CLOEXEC);
                match listener.inject(open.call.id, mapping.as_fd(), close_on_exec) {
                    Ok(()) => tracing::info!(
                        pid = guest.pid(), volume = %volume, path = %path,
                        "{guest} got the mapping of volume {volume} for {path:?}"
                    ),
                    // Closing it removes the mapping again.
                    Err(error) if error.raw_os_error() == Some(libc::ENOENT) => {}
                    Err(error) => {
                        tracing::error!(pid = guest.pid(), volume = %volume, "{guest} could not take the mapping of volume {volume}: {error}");
                        open.refuse(error.raw_os_error().unwrap_or(libc::EIO));
                    }
                }
                self.broker.merge_audit_soon();
            }
            Err(refusal) => {
                let errno = refusal.errno();
                if listener.refuse(open.call.id, errno).is_ok() {
                    tracing::error!(pid = guest.pid(), path = %path, errno, "{guest} was refused {path:?}: {refusal}");
                }
                self.broker.record_refusal(&refusal);
            }
        }
    }

    /// Lets a mapping be handed out once that is recorded, so that no use of a key is missing in the log.
    fn record(&self, verdict: Verdict, open: &Open) -> Result<Verdict, Refusal> {
        if let Verdict::Mapping(volume, _, cached_since) = &verdict {
            if !open.is_waiting() {
                let sentence = format!("the open of volume {volume} was given up before its mapping was ready");
                return Err(Refusal::new(Reason::TimedOut, sentence).of(volume));
            }
            let detail = with_source(&format!("opened as {}", open.path()), *cached_since);
            self.broker.record_use(Kind::KeyUsed, volume, &detail)?;
        }
        Ok(verdict)
    }
}

impl Open {
    fn path(&self) -> Cow<'_, str> {
        String::from_utf8_lossy(&self.request.path)
    }

    fn is_waiting(&self) -> bool {
        self.guest.listener().is_waiting(self.call.id)
    }

    fn let_through(&self) {
        settle(self.guest.listener().let_through(self.call.id));
    }

    fn refuse(&self, errno: i32) {
        settle(self.guest.listener().refuse(self.call.id, errno));
    }

    fn refuse_unknown(&self, error: &io::Error) {
        let (guest, path) = (&self.guest, self.path());
        tracing::error!(pid = guest.pid(), "it cannot be told what {path:?} is for {guest}: {error}");
        self.refuse(error.raw_os_error().unwrap_or(libc::EACCES));
    }
}
