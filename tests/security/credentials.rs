//! The driver sends a password for a registry to that registry only, and over TLS to the token realm that the registry
//! names. A job may name any registry, and any registry may name any realm and redirect to any address.

use nomad_driver_shim::pb::driver::TaskEventsRequest;
use serde_json::{Value, json};
use tokio::{io::AsyncReadExt as _, io::AsyncWriteExt as _, net::TcpListener, net::TcpStream};

use crate::{
    runtimes,
    support::{
        Env, EnvOptions, Image,
        authority::Authority,
        fake_registry::{Answer, FakeRegistry},
        shell_in, with_options,
    },
};

const USER: &str = "operator";
const PASSWORD: &str = "hunter2-of-the-operator";

fn auth(server: Option<&str>) -> Value {
    let mut auth = json!({"username": USER, "password": PASSWORD});
    if let Some(server) = server {
        auth["server_address"] = json!(server);
    }
    auth
}

/// The password as it is sent in the `Authorization` header.
fn basic() -> String {
    use base64::Engine as _;
    format!("Basic {}", base64::engine::general_purpose::STANDARD.encode(format!("{USER}:{PASSWORD}")))
}

/// A plugin whose operator has set this `auth`.
async fn plugin(auth: Value) -> Env {
    Env::configured(json!({"auth": auth})).await
}

/// Starts a registry that requires the password, and returns it with the name of an image in it.
async fn private_registry() -> (FakeRegistry, String) {
    let registry = FakeRegistry::start().await;
    registry.challenge("Basic realm=\"private\"");
    let image = registry.serve(&Image::busybox(), |_, answer| Answer { wants: Some(basic()), ..answer });
    (registry, image)
}

/// Starts a registry that requires a token of `realm`, and returns it with the name of an image in it.
async fn token_registry(realm: &str) -> (FakeRegistry, String) {
    let registry = FakeRegistry::start().await;
    registry.challenge(&format!("Bearer realm=\"{realm}\",service=\"registry\""));
    let image = registry.serve(&Image::busybox(), |_, answer| Answer { wants: Some("Bearer t0ken".into()), ..answer });
    (registry, image)
}

/// Lets the server give a token to every client.
fn give_tokens(server: &FakeRegistry) {
    server.set("/token", Answer::ok("application/json", br#"{"token":"t0ken"}"#.to_vec()));
}

fn task(image: &str, more: &Value) -> Value {
    with_options(shell_in(image, "exit 0"), more.clone())
}

/// Tries to run a task and returns the error message if its start fails.
async fn attempt(env: &mut Env, config: Value) -> Option<String> {
    let mut task = env.prepare(config).await;
    let Err(status) = env.try_start(&mut task).await else {
        env.finish_task(task).await;
        return None;
    };
    let message = status.message().to_owned();
    assert!(!message.contains(PASSWORD) && !env.plugin().stderr().contains(PASSWORD), "{message}");
    Some(message)
}

/// Returns the error message of a start that must fail.
async fn refusal(env: &mut Env, config: Value) -> String {
    attempt(env, config).await.expect("the start went well")
}

async fn runs(env: &mut Env, config: Value) {
    let (code, _, stderr) = env.run(config).await;
    assert_eq!(code, 0, "{stderr}");
}

/// The attack: a job's author names a registry of their own and reads the operator's password there.
#[tokio::test(flavor = "multi_thread")]
async fn the_operators_password_is_not_for_a_registry_that_a_job_names() {
    for runtime in runtimes() {
        let mut env = Env::configured(json!({"auth": auth(None), "default_runtime": runtime})).await;
        let (thief, image) = private_registry().await;
        let message = attempt(&mut env, task(&image, &json!({}))).await;
        assert_eq!(thief.authorizations(), Vec::<String>::new(), "{runtime}: the registry got it");
        let message = message.expect("the start went well without the password");
        assert!(message.contains(&format!("auth {{ server_address = \"{}\" }}", thief.address)), "{message}");
        assert!(message.contains("pull access denied") && message.contains("docker.io"), "{message}");
        env.finish().await;
    }
}

/// The same attack by a token realm: the registry itself does not even have to receive the password.
#[tokio::test(flavor = "multi_thread")]
async fn the_operators_password_is_not_for_a_realm_of_a_registry_that_a_job_names() {
    let mut env = plugin(auth(None)).await;
    let thief = FakeRegistry::start().await;
    thief.set("/token", Answer { wants: Some(basic()), ..Answer::ok("", vec![]) });
    let (registry, image) = token_registry(&format!("http://{}/token", thief.address)).await;
    let message = refusal(&mut env, task(&image, &json!({}))).await;
    assert_eq!(thief.authorizations(), Vec::<String>::new(), "the realm got it");
    assert_eq!(thief.requests().len(), 1, "it was asked for a token that everybody may have");
    assert!(message.contains(&format!("auth {{ server_address = \"{}\" }}", registry.address)), "{message}");
    env.finish().await;
}

/// A job's own password may be sent to the registry that the same job names, as in docker's driver.
#[tokio::test(flavor = "multi_thread")]
async fn a_jobs_own_password_is_for_its_images_registry() {
    let mut env = plugin(json!({"username": "other", "password": "of nobody"})).await;
    let (registry, image) = private_registry().await;
    runs(&mut env, task(&image, &json!({"auth": auth(None)}))).await;
    assert!(registry.authorizations().iter().all(|sent| *sent == basic()), "{:?}", registry.authorizations());
    let (registry, image) = private_registry().await;
    let message = refusal(&mut env, task(&image, &json!({"auth": auth(Some("registry.example"))}))).await;
    assert_eq!(registry.authorizations(), Vec::<String>::new());
    assert!(message.contains("is for registry.example only"), "{message}");
    env.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_port_is_another_registry() {
    let (registry, image) = private_registry().await;
    let port = registry.address.rsplit_once(':').unwrap().1.to_owned();
    for other in ["127.0.0.1".to_owned(), "127.0.0.1:443".to_owned(), format!("localhost:{port}"), format!("{port}:1")]
    {
        let mut env = plugin(auth(Some(&other))).await;
        refusal(&mut env, task(&image, &json!({}))).await;
        assert_eq!(registry.authorizations(), Vec::<String>::new(), "sent though it is for {other}");
        env.finish().await;
    }
}

/// Every form of address that docker accepts is accepted, and has the same meaning.
#[tokio::test(flavor = "multi_thread")]
async fn addresses_are_read_as_docker_reads_them() {
    let (registry, image) = private_registry().await;
    let address = &registry.address;
    let localhost = image.replace("127.0.0.1", "localhost");
    for (written, image) in [
        (address.clone(), &image),
        (format!("http://{address}"), &image),
        (format!("HTTPS://{address}/v2/"), &image),
        (address.replace("127.0.0.1", "LocalHost"), &localhost),
    ] {
        let mut env = plugin(auth(Some(&written))).await;
        runs(&mut env, task(image, &json!({}))).await;
        env.finish().await;
    }
}

/// Addresses that look like another one, or hide one, are refused. The error does not repeat a password in them.
#[tokio::test(flavor = "multi_thread")]
async fn addresses_that_are_none_are_refused() {
    let (registry, image) = private_registry().await;
    let address = &registry.address;
    let mut env = plugin(auth(Some("registry.example"))).await;
    for written in [
        format!("registry.example@{address}"),
        format!("https://{USER}:{PASSWORD}@{address}/"),
        format!("{address}@registry.example"),
        format!("{address}.evil.example"),
        format!("{address}\\.evil.example"),
        format!("{address}?registry.example"),
        "registry.example:".to_owned(),
        "ftp://registry.example".to_owned(),
    ] {
        let message = refusal(&mut env, task(&image, &json!({"auth": auth(Some(&written))}))).await;
        assert!(message.contains("auth.server_address"), "{written}: {message}");
    }
    assert_eq!(registry.requests(), Vec::<String>::new());
    let error = env.plugin().configure(&json!({"auth": auth(Some("a@b"))})).await.expect_err("the plugin took it");
    let message = nomad_driver_shim::error_chain(&error);
    assert!(message.contains("auth.server_address") && !message.contains(PASSWORD), "{message}");
    env.finish().await;
}

/// The driver does not count 0.0.0.0 as an address of this host, although it leads to the thief on this host.
#[tokio::test(flavor = "multi_thread")]
async fn a_realm_elsewhere_without_tls_gets_no_password() {
    let thief = FakeRegistry::start().await;
    give_tokens(&thief);
    let port = thief.address.rsplit_once(':').unwrap().1.to_owned();
    for realm in [
        format!("http://0.0.0.0:{port}/token"),
        format!("http://[::ffff:127.0.0.1]:{port}/token"),
        format!("http://127.0.0.1@0.0.0.0:{port}/token"),
        format!("http://{USER}:mine@127.0.0.1:{port}/token"),
    ] {
        let (registry, image) = token_registry(&realm).await;
        for (of_plugin, of_job) in
            [(auth(Some(&registry.address)), json!({})), (auth(Some("a.example")), json!({"auth": auth(None)}))]
        {
            let mut env = plugin(of_plugin).await;
            let message = attempt(&mut env, task(&image, &of_job)).await;
            assert!(thief.seen().is_empty(), "{realm}: {:?}", thief.seen());
            let message = message.expect("the start went well without a token");
            assert!(message.contains("token realm") && message.contains(&format!("{realm:?}")), "{message}");
            env.finish().await;
        }
    }
}

/// On this host a realm may be without TLS, as its registry may; with TLS it may be on any host.
#[tokio::test(flavor = "multi_thread")]
async fn realms_that_the_registry_of_the_password_names_get_it() {
    let authority = Authority::new();
    let with_tls = FakeRegistry::start_tls(authority.server(&["127.0.0.1"])).await;
    let without = FakeRegistry::start().await;
    for (scheme, server) in [("https", &with_tls), ("http", &without)] {
        give_tokens(server);
        let (registry, image) = token_registry(&format!("{scheme}://{}/token", server.address)).await;
        let mut env = EnvOptions::default()
            .config(json!({"auth": auth(Some(&registry.address))}))
            .var("SSL_CERT_FILE", authority.file.to_str().unwrap())
            .start()
            .await;
        runs(&mut env, task(&image, &json!({}))).await;
        assert_eq!(server.authorizations(), [basic()]);
        assert!(registry.authorizations().iter().all(|sent| sent == "Bearer t0ken"), "{:?}", registry.authorizations());
        env.finish().await;
    }
}

/// A request that a registry or a realm redirects is sent on without the credentials.
#[tokio::test(flavor = "multi_thread")]
async fn a_redirect_carries_no_credentials() {
    let thief = FakeRegistry::start().await;
    thief.set("/stolen", Answer { status: 404, ..Answer::ok("", vec![]) });
    let away = |answer: Answer| Answer {
        status: 307,
        headers: vec![("location".to_owned(), format!("http://{}/stolen", thief.address))],
        ..answer
    };
    // The registry redirects; it has received either the password itself or a token.
    for (realm, sent) in [(None, basic()), (Some("token"), "Bearer t0ken".to_owned())] {
        let registry = FakeRegistry::start().await;
        give_tokens(&registry);
        let challenge = realm.map_or("Basic realm=\"x\"".to_owned(), |path| {
            format!("Bearer realm=\"http://{}/{path}\"", registry.address)
        });
        registry.challenge(&challenge);
        let wanted = sent.clone();
        let image = registry.serve(&Image::busybox(), |kind, answer| match kind {
            "config" => away(Answer { wants: Some(wanted.clone()), ..answer }),
            _ => Answer { wants: Some(wanted.clone()), ..answer },
        });
        let mut env = plugin(auth(Some(&registry.address))).await;
        refusal(&mut env, task(&image, &json!({}))).await;
        assert!(registry.authorizations().contains(&sent), "{:?}", registry.authorizations());
        env.finish().await;
    }
    // The realm redirects.
    let realm = FakeRegistry::start().await;
    realm.set("/token", away(Answer::ok("", vec![])));
    let (registry, image) = token_registry(&format!("http://{}/token", realm.address)).await;
    let mut env = plugin(auth(Some(&registry.address))).await;
    refusal(&mut env, task(&image, &json!({}))).await;
    assert_eq!(realm.authorizations(), [basic()]);
    env.finish().await;
    assert_eq!(thief.requests(), ["/stolen", "/stolen", "/stolen"]);
    assert_eq!(thief.authorizations(), Vec::<String>::new());
}

/// A proxy that connects every tunnel that a client asks for to `target`, whatever host name the client gives.
async fn proxy(target: String) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    tokio::spawn(async move {
        loop {
            let (mut client, _) = listener.accept().await.unwrap();
            let target = target.clone();
            tokio::spawn(async move {
                let mut head = Vec::new();
                while !head.ends_with(b"\r\n\r\n") {
                    head.push(client.read_u8().await?);
                }
                let mut server = TcpStream::connect(target).await?;
                client.write_all(b"HTTP/1.1 200 Connected\r\n\r\n").await?;
                tokio::io::copy_bidirectional(&mut client, &mut server).await
            });
        }
    });
    address
}

/// A request to a registry on this host without TLS is not sent through a proxy on another host.
#[tokio::test(flavor = "multi_thread")]
async fn a_proxy_does_not_stand_before_this_host() {
    let (registry, image) = private_registry().await;
    let proxy = FakeRegistry::start().await;
    proxy.challenge("Basic realm=\"proxy\"");
    let asked = format!("http://{}/v2/app/manifests/1", registry.address);
    proxy.set(&asked, Answer { wants: Some(basic()), ..Answer::ok("", vec![]) });
    let mut env = EnvOptions::default()
        .config(json!({"auth": auth(Some(&registry.address))}))
        .var("HTTP_PROXY", &format!("http://{}", proxy.address))
        .start()
        .await;
    let refused = attempt(&mut env, task(&image, &json!({}))).await;
    assert_eq!(proxy.authorizations(), Vec::<String>::new(), "the proxy got it");
    assert_eq!((refused, proxy.requests()), (None, vec![]));
    assert!(registry.authorizations().contains(&basic()));
    env.finish().await;
}

/// Without a `server_address` the operator's password is for Docker Hub and for the realm that Docker Hub names.
#[tokio::test(flavor = "multi_thread")]
async fn without_an_address_it_is_for_docker_hub() {
    let authority = Authority::new();
    let hub = FakeRegistry::start_tls(authority.server(&["registry-1.docker.io", "auth.docker.io"])).await;
    hub.challenge("Bearer realm=\"https://auth.docker.io/token\",service=\"registry.docker.io\"");
    give_tokens(&hub);
    hub.serve_as("library/app:1", &Image::busybox(), |_, answer| Answer {
        wants: Some("Bearer t0ken".into()),
        ..answer
    });
    let proxy = format!("http://{}", proxy(hub.address.clone()).await);
    let mut env = EnvOptions::default()
        .config(json!({"auth": auth(None)}))
        .var("SSL_CERT_FILE", authority.file.to_str().unwrap())
        .var("HTTPS_PROXY", &proxy)
        .start()
        .await;
    runs(&mut env, task("app:1", &json!({}))).await;
    let with_password: Vec<_> = hub.seen().into_iter().filter(|seen| seen.authorization == Some(basic())).collect();
    assert!(matches!(&with_password[..], [one] if one.host == "auth.docker.io"), "{with_password:?}");
    env.finish().await;
}

/// Under the name `containerd-driver` the plugin sends the password as nomad-driver-containerd does, and logs a
/// warning.
#[tokio::test(flavor = "multi_thread")]
async fn as_containerd_driver_it_is_for_the_images_registry_with_a_warning() {
    let warning = "auth has no server_address";
    let mut env = Env::drop_in(json!({"auth": auth(None)})).await;
    let (registry, image) = private_registry().await;
    runs(&mut env, task(&image, &json!({}))).await;
    assert!(registry.authorizations().contains(&basic()));
    assert!(env.plugin().stderr().contains(warning), "{}", env.plugin().stderr());
    env.finish().await;

    let mut env = Env::drop_in(json!({"auth": auth(Some("registry.example"))})).await;
    let (registry, image) = private_registry().await;
    refusal(&mut env, task(&image, &json!({}))).await;
    assert_eq!(registry.authorizations(), Vec::<String>::new());
    assert!(!env.plugin().stderr().contains(warning), "{}", env.plugin().stderr());
    env.finish().await;
}

/// Neither the password nor its encoded form appears in a log of the finest level, in a record, or in an error.
#[tokio::test(flavor = "multi_thread")]
async fn a_password_is_written_nowhere() {
    let realm = FakeRegistry::start().await;
    give_tokens(&realm);
    let (registry, token_image) = token_registry(&format!("http://{}/token", realm.address)).await;
    let (_, basic_image) = private_registry().await;
    let mut env = EnvOptions::default()
        .config(json!({"auth": auth(Some(&registry.address))}))
        .var("NOMAD_DRIVER_SHIM_LOG", "trace")
        .start()
        .await;
    let mut events = env.driver().task_events(TaskEventsRequest {}).await.unwrap().into_inner();
    let mut held = Vec::new();
    for config in [task(&token_image, &json!({})), task(&basic_image, &json!({"auth": auth(None)}))] {
        let config = json!({"image": config["image"], "auth": config["auth"], "command": "/bin/sleep", "args": ["60"]});
        held.push(env.start(config).await);
    }
    let (_, other) = private_registry().await;
    refusal(&mut env, task(&other, &json!({"auth": {"username": USER, "password": "hunter2-wrong"}}))).await;
    assert_eq!(realm.authorizations(), [basic()]);

    let mut written = vec![("log".to_owned(), env.plugin().stderr())];
    for directory in ["run", "state"] {
        files_below(&env.dir.join(directory), &mut written);
    }
    for task in &held {
        let seen = format!("{:?}", env.inspect(&task.id).await.unwrap());
        written.push(("inspect".to_owned(), seen));
        written.push(("handle".to_owned(), format!("{:?}", task.handle)));
        let event = events.message().await.unwrap().unwrap();
        written.push(("event".to_owned(), format!("{event:?}")));
    }
    assert!(written[0].1.contains(r#""@level":"trace""#), "the log is of the finest level");
    let encoded = basic();
    let secrets = [PASSWORD, "hunter2", encoded.trim_start_matches("Basic "), "t0ken"];
    for (name, text) in &written {
        for secret in secrets {
            assert!(!text.contains(secret), "{secret:?} in {name}");
        }
    }
    for task in held {
        env.stop(&task, std::time::Duration::ZERO, "SIGKILL").await.unwrap();
        env.finish_task(task).await;
    }
    env.finish().await;
}

/// Collects all regular files below a directory, except those below a task's root file system.
fn files_below(directory: &std::path::Path, found: &mut Vec<(String, String)>) {
    for entry in std::fs::read_dir(directory).unwrap().flatten() {
        let kind = entry.file_type().unwrap();
        if kind.is_dir() && entry.file_name() != "rootfs" {
            files_below(&entry.path(), found);
        } else if kind.is_file() {
            let text = std::fs::read(entry.path()).unwrap_or_default();
            found.push((entry.path().display().to_string(), String::from_utf8_lossy(&text).into_owned()));
        }
    }
}
