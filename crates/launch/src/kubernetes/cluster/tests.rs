use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex};

use super::*;
use crate::kubernetes::Job;
use crate::kubernetes::render::tests::site;

const SET: &str = "/apis/jobset.x-k8s.io/v1alpha2/namespaces/default/jobsets/facts";
const CONFIG: &str = "/api/v1/namespaces/default/configmaps/facts";
const SERVICE: &str = "/api/v1/namespaces/default/services/facts-shard";
const SHARDS: &str = "/apis/apps/v1/namespaces/default/statefulsets/facts-shard";
const BUDGET: &str = "/apis/policy/v1/namespaces/default/poddisruptionbudgets/facts-shard";
const PODS: &str = "/api/v1/namespaces/default/pods";

/// In the order in which they are made.
const ALL: [&str; 5] = [SET, CONFIG, SERVICE, SHARDS, BUDGET];

/// An API server as far as a job asks it.
#[derive(Default)]
struct Server {
    /// What it has, by path.
    objects: BTreeMap<String, Value>,
    /// Pods by component.
    pods: BTreeMap<&'static str, Value>,
    /// What it answers to a method and a path, whatever it has.
    refuses: Vec<(&'static str, &'static str, u16)>,
    asked: Vec<Request>,
}

struct Request {
    method: String,
    path: String,
    query: String,
    content_type: String,
    body: Value,
}

impl Server {
    fn answer(&mut self, request: Request) -> (u16, Value) {
        let Request { method, path, query, body, .. } = &request;
        let refused = |code: u16, message: &str| {
            let reason = if code == 404 { "NotFound" } else { "Because" };
            let status = json!({ "kind": "Status", "status": "Failure", "code": code, "reason": reason, "message": message });
            (code, status)
        };
        let is_dry = query.contains("dryRun=All");
        let is_refused = |refusal: &&(&str, &str, u16)| {
            refusal.0 == method.as_str() && refusal.1 == path && !(is_dry && refusal.2 == 500)
        };
        let answer = match self.refuses.iter().find(is_refused) {
            Some((.., code)) => refused(*code, "not with\nme"),
            None if path.ends_with("/log") => (200, Value::from(format!("{path}?{query}"))),
            None if path == PODS => {
                let component = self.pods.keys().find(|component| query.ends_with(**component));
                (
                    200,
                    json!({ "kind": "PodList", "apiVersion": "v1", "metadata": {}, "items": component.map_or(&json!([]), |c| &self.pods[c]) }),
                )
            }
            None => match method.as_str() {
                "PATCH" => {
                    let mut object = body.clone();
                    if request.content_type == "application/merge-patch+json" {
                        object = self.objects[path].clone();
                        object["spec"]["suspend"] = body["spec"]["suspend"].clone();
                    }
                    object["metadata"]["uid"] = format!("uid of {path}").into();
                    if !is_dry {
                        self.objects.insert(path.clone(), object.clone());
                    }
                    (200, object)
                }
                "DELETE" if self.objects.remove(path).is_some() => {
                    (200, json!({ "kind": "Status", "status": "Success" }))
                }
                "GET" if self.objects.contains_key(path) => (200, self.objects[path].clone()),
                _ => refused(404, "not found"),
            },
        };
        self.asked.push(request);
        answer
    }

    /// What was asked since the last time, in short.
    fn take_asked(&mut self) -> Vec<String> {
        self.asked.drain(..).map(|Request { method, path, .. }| format!("{method} {path}")).collect()
    }
}

fn serve(server: Arc<Mutex<Server>>) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let (stream, server) = (stream.unwrap(), Arc::clone(&server));
            std::thread::spawn(move || while answer_one(&stream, &server).is_some() {});
        }
    });
    url
}

/// One request of a connection; none once it has ended.
fn answer_one(mut stream: &TcpStream, server: &Mutex<Server>) -> Option<()> {
    let mut reader = BufReader::new(stream);
    let mut line = || {
        let mut line = String::new();
        reader.read_line(&mut line).ok()?;
        Some(line.trim_end().to_owned())
    };
    let first = line()?;
    let mut words = first.split(' ');
    let (method, target) = (words.next()?.to_owned(), words.next()?.to_owned());
    let mut headers = BTreeMap::new();
    while let Some((name, value)) = line()?.split_once(": ") {
        headers.insert(name.to_lowercase(), value.to_owned());
    }
    let header = |name: &str| headers.get(name).cloned().unwrap_or_default();
    let mut body = vec![0; header("content-length").parse().unwrap_or(0)];
    reader.read_exact(&mut body).ok()?;
    let body = serde_json::from_slice(&body).unwrap_or_default();
    let (path, query) = target.split_once('?').unwrap_or((&target, ""));
    let content_type = header("content-type");
    let (path, query) = (path.to_owned(), query.to_owned());
    let (code, value) = server.lock().unwrap().answer(Request { method, path, query, content_type, body });
    let text = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
    let head = format!(
        "HTTP/1.1 {code} X\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n",
        text.len()
    );
    stream.write_all((head + &text).as_bytes()).ok()
}

/// Runs a test with a server, the manifests of a job and what it needs.
fn with_cluster(server: Server, test: impl AsyncFnOnce(Cluster, &Mutex<Server>, &[(&'static str, String)])) {
    let site = site();
    let job = Job { name: "facts", workers: 2, shards: 2, site: &site };
    let manifests = job.manifests("[run]\n", true).unwrap();
    let server = Arc::new(Mutex::new(server));
    let config = kube::Config::new(serve(Arc::clone(&server)).parse().unwrap());
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(async {
        let client = Client::try_from(config).unwrap();
        test(Cluster { client, manifests: &manifests }, &server, &job.given()).await;
    });
}

/// A server that has the job, and what the site names.
fn with_job(condition: Option<(&str, &str)>) -> Server {
    let mut server = with_given();
    for path in ALL {
        server.objects.insert(path.to_owned(), json!({ "metadata": { "name": "facts" }, "spec": {} }));
    }
    if let Some((kind, message)) = condition {
        let condition = json!([{ "type": kind, "status": "True", "message": message }]);
        server.objects.get_mut(SET).unwrap()["status"] = json!({ "conditions": condition });
    }
    server
}

fn with_given() -> Server {
    let mut server = Server::default();
    for name in ["persistentvolumeclaims/anchorage", "secrets/anchorage-shard", "secrets/anchorage-worker"] {
        let path = format!("/api/v1/namespaces/default/{name}");
        server.objects.insert(path, json!({ "metadata": { "name": name } }));
    }
    server
}

fn asked(method: &str, paths: &[&str]) -> Vec<String> {
    paths.iter().map(|path| format!("{method} {path}")).collect()
}

#[test]
fn a_job_is_made_whole() {
    with_cluster(with_given(), async |cluster, server, given| {
        cluster.apply(given).await.unwrap();
        let mut server = server.lock().unwrap();
        let patches: Vec<&Request> =
            server.asked.iter().filter(|request| request.method == "PATCH").collect();
        assert_eq!(patches.iter().map(|request| &request.path).collect::<Vec<_>>(), [ALL, ALL].concat());
        for (i, request) in patches.iter().enumerate() {
            assert_eq!(request.content_type, "application/apply-patch+yaml");
            let expected: &[&str] = match i < ALL.len() {
                true => &["dryRun=All", "fieldManager=anchorage", "fieldValidation=Strict"],
                false => &["fieldManager=anchorage", "fieldValidation=Strict"],
            };
            let mut found: Vec<&str> = request.query.split('&').filter(|part| !part.is_empty()).collect();
            found.sort_unstable();
            assert_eq!(found, expected);
            let mut manifest = cluster.manifests[i % ALL.len()].clone();
            if i > ALL.len() {
                manifest["metadata"]["ownerReferences"] = json!([{
                    "apiVersion": "jobset.x-k8s.io/v1alpha2",
                    "kind": "JobSet",
                    "name": "facts",
                    "uid": format!("uid of {SET}"),
                }]);
            }
            assert_eq!(request.body, manifest);
        }
        let first = server.take_asked();
        let names =
            ["persistentvolumeclaims/anchorage", "secrets/anchorage-shard", "secrets/anchorage-worker"];
        let given: Vec<String> = names.map(|name| format!("GET /api/v1/namespaces/default/{name}")).into();
        assert_eq!(first[..4], [asked("GET", &[SET]), given].concat());
    });
}

#[test]
fn what_the_server_refuses_is_not_made() {
    let server = Server { refuses: vec![("PATCH", SHARDS, 422)], ..with_given() };
    with_cluster(server, async |cluster, server, given| {
        let error = cluster.apply(given).await.unwrap_err().to_string();
        assert_eq!(error, "StatefulSet facts-shard: not with me");
        assert!(!server.lock().unwrap().objects.contains_key(SET));
    });
    // One that passes the trial and is refused then takes all others with it.
    let server = Server { refuses: vec![("PATCH", SHARDS, 500)], ..with_given() };
    with_cluster(server, async |cluster, server, given| {
        let error = cluster.apply(given).await.unwrap_err().to_string();
        assert_eq!(error, "StatefulSet facts-shard: not with me");
        let mut server = server.lock().unwrap();
        assert!(ALL.iter().all(|path| !server.objects.contains_key(*path)));
        let asked_last = server.take_asked();
        let last = [asked("DELETE", &[BUDGET, SHARDS, SERVICE, CONFIG, SET]), asked("GET", &[SET])].concat();
        assert!(asked_last.ends_with(&last), "{asked_last:?}");
    });
}

#[test]
fn what_the_site_names_must_be_there() {
    let mut server = with_given();
    server.objects.remove("/api/v1/namespaces/default/secrets/anchorage-worker");
    with_cluster(server, async |cluster, server, given| {
        let error = cluster.apply(given).await.unwrap_err().to_string();
        let expected =
            "Secret anchorage-worker: expected one that the site names, found none in namespace default";
        assert_eq!(error, expected);
        assert!(!server.lock().unwrap().objects.contains_key(SET));
    });
    // Who may not look at secrets may submit all the same.
    let mut server = with_given();
    server.refuses = vec![("GET", "/api/v1/namespaces/default/secrets/anchorage-worker", 403)];
    with_cluster(server, async |cluster, _, given| cluster.apply(given).await.unwrap());
}

#[test]
fn a_job_that_is_there_is_not_made_twice_and_one_that_is_over_is_replaced() {
    with_cluster(with_job(None), async |cluster, server, given| {
        let error = cluster.apply(given).await.unwrap_err().to_string();
        let expected = "JobSet facts: expected no job of this name (cancel it, or use another run.dir), found one \
                        that is active";
        assert_eq!(error, expected);
        assert_eq!(server.lock().unwrap().take_asked(), asked("GET", &[SET]));
    });
    with_cluster(with_job(Some(("Completed", ""))), async |cluster, server, given| {
        cluster.apply(given).await.unwrap();
        let asked_first = server.lock().unwrap().take_asked();
        let first =
            [&asked("GET", &[SET])[..], &asked("DELETE", &[BUDGET, SHARDS, SERVICE, CONFIG, SET])].concat();
        assert_eq!(asked_first[..6], first);
    });
}

#[test]
fn workers_stop_before_their_shards() {
    let mut server = with_job(None);
    server
        .pods
        .insert("worker", json!([{ "metadata": { "name": "w" }, "status": { "phase": "Succeeded" } }]));
    with_cluster(server, async |cluster, server, _| {
        cluster.cancel(Duration::ZERO).await.unwrap();
        let mut server = server.lock().unwrap();
        assert!(ALL.iter().all(|path| !server.objects.contains_key(*path)));
        let suspend = server.asked.iter().find(|request| request.method == "PATCH").unwrap();
        assert_eq!((suspend.path.as_str(), &suspend.body), (SET, &json!({ "spec": { "suspend": true } })));
        assert_eq!(suspend.content_type, "application/merge-patch+json");
        let query = "app.kubernetes.io%2Finstance%3Dfacts%2Capp.kubernetes.io%2Fcomponent%3Dworker";
        let pods = server.asked.iter().find(|request| request.path == PODS).unwrap();
        assert!(pods.query.contains(query), "{}", pods.query);
        let expected = [
            asked("GET", &[SET]),
            asked("PATCH", &[SET]),
            asked("GET", &[PODS]),
            asked("DELETE", &[BUDGET, SHARDS, SERVICE, CONFIG, SET]),
            asked("GET", &[SET]),
        ];
        assert_eq!(server.take_asked(), expected.concat());
    });
    with_cluster(with_given(), async |cluster, _, _| {
        let error = cluster.cancel(Duration::ZERO).await.unwrap_err().to_string();
        assert_eq!(error, "JobSet facts: expected a job in the cluster, found none");
    });
}

#[test]
fn the_state_of_a_job_is_told_with_its_pods() {
    let ended = json!({ "exitCode": 1, "reason": "Error", "message": "step 3\nerror: no such file\n" });
    let worker = json!({
        "metadata": { "name": "facts-worker-0-0-abcde" },
        "spec": { "nodeName": "n1", "containers": [] },
        "status": { "phase": "Failed", "containerStatuses": [{
            "name": "worker", "image": "", "imageID": "", "ready": false, "restartCount": 0,
            "state": { "terminated": ended },
        }] },
    });
    let waiting = json!({
        "metadata": { "name": "facts-shard-0" },
        "status": { "phase": "Pending", "conditions": [{
            "type": "PodScheduled", "status": "False", "message": "0/3 nodes are available",
        }] },
    });
    let mut server = with_job(Some(("Failed", "jobset failed due to\none or more job failures")));
    server.pods.insert("worker", json!([worker]));
    server.pods.insert("shard", json!([waiting]));
    server.refuses = vec![("GET", "/api/v1/namespaces/default/pods/facts-shard-0/log", 400)];
    with_cluster(server, async |cluster, _, _| {
        let status = cluster.status().await.unwrap();
        assert_eq!(status.phase.to_string(), "failed: jobset failed due to one or more job failures");
        let pod = |name: &str, phase: &str, node: &str, reason: &str| PodStatus {
            name: name.into(),
            phase: phase.into(),
            node: node.into(),
            restarts: 0,
            reason: reason.into(),
        };
        let expected = [
            pod("facts-worker-0-0-abcde", "Failed", "n1", "exit code 1: error: no such file"),
            pod("facts-shard-0", "Pending", "", "0/3 nodes are available"),
        ];
        assert_eq!(status.pods, expected);
        let logs = cluster.logs(20).await.unwrap();
        let log = "/api/v1/namespaces/default/pods/facts-worker-0-0-abcde/log?&tailLines=20";
        assert_eq!(logs, [("facts-worker-0-0-abcde".to_owned(), log.to_owned())]);
    });
    for (condition, expected) in [(Some(("Completed", "")), "completed"), (None, "active")] {
        with_cluster(with_job(condition), async |cluster, _, _| {
            assert_eq!(cluster.status().await.unwrap().phase.to_string(), expected);
        });
    }
    let mut server = with_job(None);
    server.objects.get_mut(SET).unwrap()["spec"]["suspend"] = true.into();
    with_cluster(server, async |cluster, _, _| {
        assert_eq!(cluster.status().await.unwrap().phase, Phase::Suspended);
    });
    with_cluster(with_given(), async |cluster, _, _| {
        assert_eq!(cluster.status().await.unwrap().phase.to_string(), "not in the cluster");
    });
}

#[test]
fn a_cluster_that_is_not_reached_is_told_in_one_line() {
    let manifests = [
        json!({ "kind": "JobSet", "apiVersion": "a/v1", "metadata": { "name": "facts", "namespace": "x" } }),
    ];
    // Nobody listens on a port that was given back.
    let free = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let config = kube::Config::new(format!("http://{free}").parse().unwrap());
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(async {
        let client = Client::try_from(config).unwrap();
        let error = Cluster { client, manifests: &manifests }.status().await.unwrap_err().to_string();
        assert!(
            error.starts_with("JobSet facts: ") && error.contains("refused") && !error.contains('\n'),
            "{error}"
        );
    });
}
