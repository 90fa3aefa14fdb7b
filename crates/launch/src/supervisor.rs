use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

use crate::{Error, REQUEUE, Result};

/// A process of a job.
#[derive(Clone, Debug)]
pub struct Role {
    /// Such as `worker 1`.
    pub name: String,
    /// What runs it.
    pub program: PathBuf,
    /// Its arguments.
    pub args: Vec<String>,
    /// Variables beside those of this process.
    pub variables: Vec<(String, String)>,
    /// Where its output and errors go, appended.
    pub log: PathBuf,
    /// Whether the job is over when it ends well, with all others of this kind.
    pub is_worker: bool,
}

/// What has become of a role.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Event {
    /// It ended, and was started again.
    StartedAgain {
        /// Its name.
        role: String,
        /// Its exit code or signal.
        ended: String,
    },
    /// All workers have ended: they are done, or have saved and want to be started again.
    Over {
        /// Whether any of them wants that.
        is_stopped: bool,
    },
}

/// Processes of one job on this machine. Only one that has ended is started again: one that does not answer
/// may still be at work. Dropped, it kills them.
pub struct Supervisor {
    roles: Vec<Running>,
    /// How often each role is started again before the job fails; progress forgives.
    retries: usize,
    /// Whether workers have been told to stop: none takes the place of one that ends then.
    is_stopping: bool,
}

struct Running {
    role: Role,
    child: Child,
    started_again: usize,
    ended: Option<ExitStatus>,
}

impl Supervisor {
    /// A job without processes.
    pub fn new(retries: usize) -> Self {
        Self { roles: vec![], retries, is_stopping: false }
    }

    /// Starts a role.
    ///
    /// # Errors
    /// When its program or its log cannot be opened.
    pub fn start(&mut self, role: Role) -> Result<()> {
        let child = spawn(&role)?;
        self.roles.push(Running { role, child, started_again: 0, ended: None });
        Ok(())
    }

    /// Looks who has ended, without waiting. Ends that nobody asked for are made good by another process.
    ///
    /// # Errors
    /// When a worker says itself that it cannot go on, and when a role has ended too often.
    pub fn look(&mut self) -> Result<Option<Event>> {
        for place in 0..self.roles.len() {
            let running = &mut self.roles[place];
            if running.ended.is_some() {
                continue;
            }
            let path = &running.role.program;
            let ended =
                running.child.try_wait().map_err(|source| Error::Io { path: path.clone(), source })?;
            let Some(status) = ended else { continue };
            let is_final = running.role.is_worker
                && matches!(status.code(), Some(code) if code == 0 || code == i32::from(REQUEUE));
            if is_final || self.is_stopping {
                running.ended = Some(status);
                continue;
            }
            // An exit code of 1 is an error that the program has explained: it would come again.
            let explained = status.code() == Some(1) && running.role.is_worker;
            if explained || running.started_again >= self.retries {
                let Role { name, log, .. } = running.role.clone();
                let last_line = last_line(&log).unwrap_or_default();
                let started_again = if explained { 0 } else { running.started_again };
                return Err(Error::Ended { role: name, ended: text(status), started_again, last_line, log });
            }
            running.child = spawn(&running.role)?;
            running.started_again += 1;
            let role = running.role.name.clone();
            return Ok(Some(Event::StartedAgain { role, ended: text(status) }));
        }
        let mut workers = self.roles.iter().filter(|running| running.role.is_worker).peekable();
        if workers.peek().is_none() || workers.clone().any(|running| running.ended.is_none()) {
            return Ok(None);
        }
        let stopped = |running: &Running| running.ended.and_then(|status| status.code()) != Some(0);
        Ok(Some(Event::Over { is_stopped: workers.any(stopped) }))
    }

    /// The job has come further: what went wrong before counts no more.
    pub fn progressed(&mut self) {
        self.roles.iter_mut().for_each(|running| running.started_again = 0);
    }

    /// Asks the workers to stop.
    pub fn stop_workers(&mut self) {
        self.is_stopping = true;
        self.roles.iter_mut().filter(|running| running.role.is_worker).for_each(Running::stop);
    }

    /// Asks everyone to stop, and waits; kills who takes longer than `limit`.
    pub fn finish(mut self, limit: Duration) {
        self.roles.iter_mut().for_each(Running::stop);
        let deadline = Instant::now() + limit;
        while Instant::now() < deadline && self.roles.iter_mut().any(Running::is_running) {
            std::thread::park_timeout(Duration::from_millis(10));
        }
    }
}

impl Drop for Supervisor {
    fn drop(&mut self) {
        for running in &mut self.roles {
            let _ = running.child.kill();
            let _ = running.child.wait();
        }
    }
}

impl Running {
    fn is_running(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    fn stop(&mut self) {
        // One that is over and waited for has no process any more, and its number may be another's.
        if self.ended.is_none()
            && self.is_running()
            && let Some(pid) = Pid::from_raw(self.child.id() as i32)
        {
            let _ = kill_process(pid, Signal::TERM);
        }
    }
}

fn spawn(role: &Role) -> Result<Child> {
    let failed = |path: &Path| {
        let path = path.to_owned();
        move |source: io::Error| Error::Io { path, source }
    };
    let log = OpenOptions::new().create(true).append(true).open(&role.log).map_err(failed(&role.log))?;
    let errors = log.try_clone().map_err(failed(&role.log))?;
    Command::new(&role.program)
        .args(&role.args)
        .envs(role.variables.iter().cloned())
        .env(crate::CHILD, "1")
        .stdin(Stdio::null())
        .stdout(log)
        .stderr(errors)
        // Ctrl-C is for the launcher, who tells them in turn.
        .process_group(0)
        .spawn()
        .map_err(failed(&role.program))
}

fn text(status: ExitStatus) -> String {
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("exit code {code}"),
        (None, Some(signal)) => format!("signal {signal}"),
        (None, None) => status.to_string(),
    }
}

/// The last line of a file that may be long.
fn last_line(path: &Path) -> io::Result<String> {
    const MOST: u64 = 4096;
    let mut file = File::open(path)?;
    let n_bytes = file.metadata()?.len();
    file.seek(SeekFrom::Start(n_bytes.saturating_sub(MOST)))?;
    let mut end = vec![];
    file.read_to_end(&mut end)?;
    let text = String::from_utf8_lossy(&end);
    Ok(text.lines().rev().find(|line| !line.trim().is_empty()).unwrap_or_default().trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn role(folder: &Path, name: &str, script: &str, is_worker: bool) -> Role {
        Role {
            name: name.into(),
            program: "/bin/sh".into(),
            args: vec!["-c".into(), script.into()],
            variables: vec![("GREETING".into(), "hello".into())],
            log: folder.join(name),
            is_worker,
        }
    }

    fn wait(supervisor: &mut Supervisor) -> Result<Event> {
        loop {
            if let Some(event) = supervisor.look()? {
                return Ok(event);
            }
            std::thread::park_timeout(Duration::from_millis(5));
        }
    }

    #[test]
    fn who_is_killed_is_started_again_and_who_is_done_is_not() {
        let folder = tempfile::tempdir().unwrap();
        let mut job = Supervisor::new(2);
        // Killed the first time, done the second.
        let once = "echo $GREETING; if [ -e $0.once ]; then exit 0; fi; : > $0.once; kill -9 $$";
        let mut first = role(folder.path(), "worker 0", once, true);
        first.args.push(folder.path().join("state").display().to_string());
        job.start(first).unwrap();
        job.start(role(folder.path(), "shard 0", "trap 'exit 0' TERM; while :; do sleep 0.05; done", false))
            .unwrap();
        let event = wait(&mut job).unwrap();
        assert_eq!(event, Event::StartedAgain { role: "worker 0".into(), ended: "signal 9".into() });
        assert_eq!(wait(&mut job).unwrap(), Event::Over { is_stopped: false });
        job.finish(Duration::from_secs(10));
        assert_eq!(std::fs::read_to_string(folder.path().join("worker 0")).unwrap(), "hello\nhello\n");
    }

    #[test]
    fn a_worker_that_explains_itself_ends_the_job_and_so_does_one_killed_too_often() {
        let folder = tempfile::tempdir().unwrap();
        let mut job = Supervisor::new(2);
        job.start(role(folder.path(), "worker 0", "echo 'error: no such file' >&2; exit 1", true)).unwrap();
        let error = wait(&mut job).unwrap_err().to_string();
        let log = folder.path().join("worker 0");
        let expected = "worker 0 ended with exit code 1 (error: no such file): its log is ";
        assert_eq!(error, format!("{expected}{}", log.display()));

        let mut job = Supervisor::new(2);
        job.start(role(folder.path(), "worker 1", "kill -9 $$", true)).unwrap();
        assert!(matches!(wait(&mut job), Ok(Event::StartedAgain { .. })));
        assert!(matches!(wait(&mut job), Ok(Event::StartedAgain { .. })));
        let error = wait(&mut job).unwrap_err().to_string();
        let expected =
            "worker 1 ended with signal 9 once more, started again 2 times without progress: its log is";
        assert!(error.starts_with(expected), "{error}");
    }

    #[test]
    fn a_job_told_to_stop_is_stopped() {
        let folder = tempfile::tempdir().unwrap();
        let mut job = Supervisor::new(0);
        let script = "trap 'exit 75' TERM; echo ready; while :; do sleep 0.05; done";
        job.start(role(folder.path(), "worker 0", script, true)).unwrap();
        while std::fs::read_to_string(folder.path().join("worker 0")).unwrap().is_empty() {
            std::thread::park_timeout(Duration::from_millis(5));
        }
        assert_eq!(job.look().unwrap(), None);
        job.stop_workers();
        assert_eq!(wait(&mut job).unwrap(), Event::Over { is_stopped: true });
    }
}
