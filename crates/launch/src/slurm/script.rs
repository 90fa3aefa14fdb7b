use std::fmt::Write as _;
use std::path::Path;

use super::Site;
use super::site::setting;
use crate::shell::word;
use crate::{Error, REQUEUE, Result};

/// What a batch script is made of.
#[derive(Clone, Copy, Debug)]
pub struct Script<'a> {
    /// Name of the job; characters that Slurm's lists do not show well are replaced.
    pub name: &'a str,
    /// The program that all processes run.
    pub program: &'a Path,
    /// Its configuration, absolute.
    pub config: &'a Path,
    /// Where it runs: what relative paths of the configuration begin at.
    pub folder: &'a Path,
    /// Workers.
    pub workers: usize,
    /// Shards; none, and every worker keeps the whole bank.
    pub shards: usize,
    /// The site.
    pub site: &'a Site,
}

/// Seconds that all workers have to end once one has.
const END_TOGETHER_S: u32 = 60;

/// Nodes of a job, and what each of them gives.
struct Nodes {
    n: usize,
    cpus: usize,
    gpus: usize,
    memory_gib: Option<f64>,
}

/// The same in every script.
const FUNCTIONS: &str = r#"
told='' step=''
trap 'told=1; [ -z "$step" ] || kill -USR1 "$step"' USR1

# Waits for a step, which is told what this script is. A job that has saved, or was told to, is queued again, unless it
# has been cancelled.
attend() {
    local ended
    step=$1
    [ -z "$told" ] || kill -USR1 "$step"
    while wait "$step"; ended=$?; kill -0 "$step" 2>/dev/null; do :; done
    [ "$ended" = 0 ] && return
    if [ "$ended" = @REQUEUE@ ] || [ -n "$told" ]; then
        scontrol show job --oneliner "$SLURM_JOB_ID" | grep -q ' JobState=RUNNING ' &&
            scontrol requeue "$SLURM_JOB_ID" && sleep 60
    fi
    exit "$ended"
}

# Of a node, as Slurm itself reaches it: its name need not be known here.
address() {
    local shown name found
    shown=$(scontrol show node --oneliner "$1") || return
    name=${shown#* NodeAddr=} name=${name%% *}
    read -r found _ < <(getent ahostsv4 "$name") && echo "$found" && return
    echo "error: node $1: expected an address of $name, found none" >&2
    return 1
}
"#;

impl Script<'_> {
    /// The script, which sbatch is to be given in the run's folder.
    ///
    /// # Errors
    /// When the site has no room for the job, or a path is no text.
    pub fn render(&self) -> Result<String> {
        let Self { site, workers, shards, .. } = *self;
        site.check()?;
        if workers == 0 {
            return Err(setting("worker", "at least 1 worker", "0"));
        }
        let groups = site.groups_of_ports(1 + shards)?;
        let of_shards = site.shard.partition.is_some() && shards > 0;
        let (first, second) = self.nodes(of_shards)?;
        let mut script = String::from("#!/bin/bash\n");
        self.options(&mut script, &first);
        if let Some(second) = &second {
            script += "#SBATCH hetjob\n";
            self.part(&mut script, second, (&site.shard.partition, &site.shard.options));
        }
        script += "\n# Written by `anchorage submit`, which gives it to sbatch in the run's folder.\n";
        script += &FUNCTIONS.replace("@REQUEUE@", &REQUEUE.to_string());
        let _ = writeln!(script, "\ncd {} || exit", path(self.folder)?);
        for line in &site.setup {
            let _ = writeln!(script, "{line}");
        }
        let _ = writeln!(script, "anchorage={}\nconfig={}", path(self.program)?, path(self.config)?);
        self.addresses(&mut script, groups, of_shards);
        self.steps(&mut script, &first, second.as_ref());
        Ok(script)
    }

    /// Nodes of the workers, which the shards share unless they have their own.
    fn nodes(&self, of_shards: bool) -> Result<(Nodes, Option<Nodes>)> {
        let Self { site: Site { worker, shard, .. }, workers, shards, .. } = *self;
        let per_node = worker.per_node.min(workers);
        let n = workers.div_ceil(per_node);
        let own = of_shards.then(|| {
            let per_node = shard.per_node.min(shards);
            let memory_gib = shard.memory_gib.map(|gib| gib * per_node as f64);
            Nodes { n: shards.div_ceil(per_node), cpus: per_node * shard.cpus, gpus: 0, memory_gib }
        });
        let beside = if of_shards { 0 } else { shards.div_ceil(n) };
        if beside > shard.per_node {
            let expected = format!("at least {beside}, for {shards} shards on {n} nodes");
            return Err(setting("shard.per_node", expected, shard.per_node));
        }
        let sum = |worker: f64, shard: f64| worker * per_node as f64 + shard * beside as f64;
        let memory_gib = worker.memory_gib.zip(shard.memory_gib).map(|(worker, shard)| sum(worker, shard));
        let cpus = per_node * worker.cpus + beside * shard.cpus;
        Ok((Nodes { n, cpus, gpus: per_node * worker.gpus, memory_gib }, own))
    }

    /// Lines for sbatch about the whole job and about its (first) nodes.
    fn options(&self, script: &mut String, nodes: &Nodes) {
        let Site { lead_s, partition, options, .. } = self.site;
        let is_shown = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
        let name: String = self.name.chars().map(|c| if is_shown(c) { c } else { '_' }).collect();
        let _ = write!(
            script,
            "#SBATCH --job-name={name}\n#SBATCH --requeue\n#SBATCH --open-mode=append\n\
             #SBATCH --output=logs/job.log\n#SBATCH --signal=B:USR1@{lead_s}\n"
        );
        self.part(script, nodes, (partition, options));
    }

    /// Lines for sbatch about some of the nodes.
    fn part(&self, script: &mut String, nodes: &Nodes, (partition, options): (&Option<String>, &[String])) {
        let Nodes { n, cpus, gpus, memory_gib } = nodes;
        let _ = writeln!(script, "#SBATCH --time={}", self.site.time);
        for (option, name) in [("account", &self.site.account), ("partition", partition)] {
            if let Some(name) = name {
                let _ = writeln!(script, "#SBATCH --{option}={name}");
            }
        }
        let _ = write!(script, "#SBATCH --nodes={n}\n#SBATCH --ntasks={n}\n#SBATCH --cpus-per-task={cpus}\n");
        if *gpus > 0 {
            let _ = writeln!(script, "#SBATCH --gpus-per-node={gpus}");
        }
        if let Some(gib) = memory_gib {
            let _ = writeln!(script, "#SBATCH --mem={:.0}M", (gib * 1024.0).ceil());
        }
        for option in options {
            let _ = writeln!(script, "#SBATCH {option}");
        }
    }

    /// Where rank 0 and the shards listen.
    fn addresses(&self, script: &mut String, groups: usize, of_shards: bool) {
        let n_ports = 1 + self.shards;
        let lists = match of_shards {
            true => ["_HET_GROUP_0", "_HET_GROUP_1"],
            false => ["", ""],
        };
        let nodes = |group: &str| format!("< <(scontrol show hostnames \"$SLURM_JOB_NODELIST{group}\")");
        let _ = write!(
            script,
            "\n# One for all processes of this attempt: who is left of another is none of them.\n\
             export ANCHORAGE_JOB=\"$SLURM_JOB_ID.${{SLURM_RESTART_COUNT:-0}}\"\n\
             # Jobs that share a node have other ports, and so have attempts: of the last one somebody may still be there.\n\
             port=$(({} + (SLURM_JOB_ID + 101 * ${{SLURM_RESTART_COUNT:-0}}) % {groups} * {n_ports}))\n\
             mapfile -t nodes {}\n\
             MASTER_ADDR=$(address \"${{nodes[0]}}\") || exit\n\
             export MASTER_ADDR MASTER_PORT=$port\n",
            self.site.ports.0,
            nodes(lists[0]),
        );
        if self.shards == 0 {
            return;
        }
        if of_shards {
            let _ = writeln!(script, "mapfile -t nodes {}", nodes(lists[1]));
        }
        let _ = write!(
            script,
            "nodes=(\"${{nodes[@]:0:{0}}}\") addresses=''\n\
             for ((i = 0; i < {0}; i++)); do\n    \
                 found=$(address \"${{nodes[i % ${{#nodes[@]}}]}}\") || exit\n    \
                 addresses+=\"${{addresses:+,}}\\\"$found:$((port + 1 + i))\\\"\"\n\
             done\n\
             shards=\"memory.shards=[$addresses]\"\n",
            self.shards
        );
    }

    /// Prepares the corpus, then starts the shards and the workers and waits for these.
    fn steps(&self, script: &mut String, first: &Nodes, second: Option<&Nodes>) {
        let Self { site, workers, shards, .. } = *self;
        let group = |i: usize| if second.is_some() { format!(" --het-group={i}") } else { String::new() };
        // Steps share what the job has: the processes of each are told how many processors are theirs.
        let step = |nodes: usize, tasks: usize, cpus: usize| {
            format!(
                "--export=ALL --overlap --cpu-bind=none --nodes={nodes} --ntasks={tasks} --cpus-per-task={cpus}"
            )
        };
        let all = first.cpus;
        let _ = writeln!(
            script,
            "\nsrun{} {} \"$anchorage\" prepare \"$config\" &\nattend $!",
            group(0),
            step(1, 1, all)
        );
        if shards > 0 {
            let (i, nodes) = second.map_or((0, first.n), |second| (1, second.n));
            let _ = write!(
                script,
                "\n{{\n    srun{} {} --nodelist=\"$(IFS=,; echo \"${{nodes[*]}}\")\" --distribution=cyclic --kill-on-bad-exit=1 \\\n        \
                     \"$anchorage\" task shard \"$config\" --workers={workers} --set \"$shards\" ||\n        \
                     {{ echo 'error: the shards have ended' >&2; kill $$; }}\n\
                 }} &\n",
                group(i),
                step(nodes.min(shards), shards, site.shard.cpus),
            );
        }
        let shards = if shards > 0 { " --set \"$shards\"" } else { "" };
        let _ = write!(
            script,
            "\nsrun{} {} --distribution=block --kill-on-bad-exit=0 --wait={END_TOGETHER_S} \\\n    \
                 \"$anchorage\" task worker \"$config\"{shards} &\nattend $!\n",
            group(0),
            step(first.n, workers, site.worker.cpus),
        );
    }
}

fn path(path: &Path) -> Result<String> {
    let text = path.to_str().ok_or_else(|| Error::NoText { path: path.to_owned() })?;
    Ok(word(text))
}

#[cfg(test)]
mod tests {
    use super::super::site::tests::site;
    use super::super::{ShardSite, WorkerSite};
    use super::*;

    fn script<'a>(site: &'a Site, workers: usize, shards: usize) -> Script<'a> {
        let (program, config) = (Path::new("/opt/anchorage"), Path::new("/runs/tiny/job/config.toml"));
        Script { name: "tiny run", program, config, folder: Path::new("/home/a b"), workers, shards, site }
    }

    /// What differs between scripts: all but the functions.
    fn parts(script: &Script) -> (String, String) {
        let text = script.render().unwrap();
        let functions = FUNCTIONS.replace("@REQUEUE@", "75");
        let (before, after) = text.split_once(&functions).unwrap();
        (before.to_owned(), after.to_owned())
    }

    #[test]
    fn a_job_of_one_part() {
        let mut site = site();
        site.shard.per_node = 2;
        let (before, after) = parts(&script(&site, 2, 3));
        let expected = r#"#!/bin/bash
#SBATCH --job-name=tiny_run
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=logs/job.log
#SBATCH --signal=B:USR1@120
#SBATCH --time=01:00:00
#SBATCH --partition=main
#SBATCH --nodes=2
#SBATCH --ntasks=2
#SBATCH --cpus-per-task=3

# Written by `anchorage submit`, which gives it to sbatch in the run's folder.
"#;
        assert_eq!(before, expected);
        let expected = r#"
cd '/home/a b' || exit
anchorage=/opt/anchorage
config=/runs/tiny/job/config.toml

# One for all processes of this attempt: who is left of another is none of them.
export ANCHORAGE_JOB="$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}"
# Jobs that share a node have other ports, and so have attempts: of the last one somebody may still be there.
port=$((20000 + (SLURM_JOB_ID + 101 * ${SLURM_RESTART_COUNT:-0}) % 2500 * 4))
mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
MASTER_ADDR=$(address "${nodes[0]}") || exit
export MASTER_ADDR MASTER_PORT=$port
nodes=("${nodes[@]:0:3}") addresses=''
for ((i = 0; i < 3; i++)); do
    found=$(address "${nodes[i % ${#nodes[@]}]}") || exit
    addresses+="${addresses:+,}\"$found:$((port + 1 + i))\""
done
shards="memory.shards=[$addresses]"

srun --export=ALL --overlap --cpu-bind=none --nodes=1 --ntasks=1 --cpus-per-task=3 "$anchorage" prepare "$config" &
attend $!

{
    srun --export=ALL --overlap --cpu-bind=none --nodes=2 --ntasks=3 --cpus-per-task=1 --nodelist="$(IFS=,; echo "${nodes[*]}")" --distribution=cyclic --kill-on-bad-exit=1 \
        "$anchorage" task shard "$config" --workers=2 --set "$shards" ||
        { echo 'error: the shards have ended' >&2; kill $$; }
} &

srun --export=ALL --overlap --cpu-bind=none --nodes=2 --ntasks=2 --cpus-per-task=1 --distribution=block --kill-on-bad-exit=0 --wait=60 \
    "$anchorage" task worker "$config" --set "$shards" &
attend $!
"#;
        assert_eq!(after, expected);
    }

    #[test]
    fn a_job_of_two_parts() {
        let mut site = site();
        site.account = Some("physics".into());
        site.setup = vec!["module load cuda".into()];
        site.options = vec!["--exclusive".into()];
        site.worker = WorkerSite { per_node: 8, cpus: 12, gpus: 1, memory_gib: Some(100.0) };
        site.shard = ShardSite {
            per_node: 2,
            cpus: 16,
            memory_gib: Some(200.5),
            partition: Some("cpu".into()),
            options: vec!["--constraint=big".into()],
        };
        let (before, after) = parts(&script(&site, 64, 4));
        let expected = r#"#!/bin/bash
#SBATCH --job-name=tiny_run
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=logs/job.log
#SBATCH --signal=B:USR1@120
#SBATCH --time=01:00:00
#SBATCH --account=physics
#SBATCH --partition=main
#SBATCH --nodes=8
#SBATCH --ntasks=8
#SBATCH --cpus-per-task=96
#SBATCH --gpus-per-node=8
#SBATCH --mem=819200M
#SBATCH --exclusive
#SBATCH hetjob
#SBATCH --time=01:00:00
#SBATCH --account=physics
#SBATCH --partition=cpu
#SBATCH --nodes=2
#SBATCH --ntasks=2
#SBATCH --cpus-per-task=32
#SBATCH --mem=410624M
#SBATCH --constraint=big

# Written by `anchorage submit`, which gives it to sbatch in the run's folder.
"#;
        assert_eq!(before, expected);
        assert!(
            after.starts_with("\ncd '/home/a b' || exit\nmodule load cuda\nanchorage=/opt/anchorage\n"),
            "{after}"
        );
        for line in [
            r#"mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST_HET_GROUP_0")"#,
            r#"mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST_HET_GROUP_1")"#,
            "srun --het-group=0 --export=ALL --overlap --cpu-bind=none --nodes=1 --ntasks=1 --cpus-per-task=96 ",
            "srun --het-group=1 --export=ALL --overlap --cpu-bind=none --nodes=2 --ntasks=4 --cpus-per-task=16 ",
            "srun --het-group=0 --export=ALL --overlap --cpu-bind=none --nodes=8 --ntasks=64 --cpus-per-task=12 ",
        ] {
            assert!(after.contains(line), "{line}\n{after}");
        }
        // Without shards there is one part, and nothing about them.
        let text = script(&site, 3, 0).render().unwrap();
        assert!(!text.contains("shards") && !text.contains("HET_GROUP") && !text.contains("het"), "{text}");
        assert!(
            text.contains("#SBATCH --nodes=1\n") && text.contains("#SBATCH --cpus-per-task=36\n"),
            "{text}"
        );
    }

    /// Any path and name comes to the shell, and to sbatch, as it is.
    #[test]
    fn paths_and_names_of_any_kind() {
        let site = site();
        for part in
            ["a b", "it's", "\"", "$HOME", "`id`", "$(id)", "\\", "é", "#x", "%j", ";id;", "*", "a\nb"]
        {
            let [folder, program, config] =
                ["folder", "program", "config"].map(|name| format!("/x/{part}/{part}{name}"));
            let script = Script {
                name: part,
                program: Path::new(&program),
                config: Path::new(&config),
                folder: Path::new(&folder),
                workers: 1,
                shards: 1,
                site: &site,
            };
            let text = script.render().unwrap();
            let (options, _) = text.split_once("\n\n").unwrap();
            let is_option = |line: &str| line.starts_with('#') && !line.contains([' ', '$', '\\', '"']);
            assert!(
                options.lines().all(|line| is_option(&line.replacen("#SBATCH ", "#SBATCH", 1))),
                "{options}"
            );
            let (_, paths) = parts(&script);
            let (paths, _) = paths.split_once("\n# One for all").unwrap();
            let show = "printf '%s\\0' \"$at\" \"$anchorage\" \"$config\"";
            let test = format!("cd() {{ at=$1; }}\n{paths}\n{show}");
            let output = std::process::Command::new("bash").args(["-c", &test]).output().unwrap();
            let found = String::from_utf8(output.stdout).unwrap();
            assert_eq!(found.split_terminator('\0').collect::<Vec<_>>(), [&folder, &program, &config]);
        }
        let bytes: &std::ffi::OsStr = std::os::unix::ffi::OsStrExt::from_bytes(b"/x/\xff");
        let refused = Script { folder: Path::new(bytes), ..script(&site, 1, 0) }.render().unwrap_err();
        assert!(refused.to_string().contains("expected a path that is UTF-8"), "{refused}");
        let refused = script(&site, 0, 0).render().unwrap_err().to_string();
        assert_eq!(refused, "slurm.worker: expected at least 1 worker, found 0");
    }
}
