package cluster

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"time"
)

// Files in the data folder. The components run in it and are given these names
// as they are: the path of a temporary folder may be too long for a socket, or
// have commas in it.
const (
	authorityFile     = "ca.crt"
	servingCertFile   = "apiserver.crt"
	servingKeyFile    = "apiserver.key"
	accountKeyFile    = "serviceaccounts.key"
	accountIssuer     = "https://kubernetes.default.svc"
	tokenFile         = "tokens.csv"
	auditPolicyFile   = "audit-policy.yaml"
	auditLogFile      = "audit.log"
	adminKubeconfig   = "kubeconfig"
	managerKubeconfig = "kube-controller-manager.kubeconfig"
	etcdData          = "etcd"

	// The sockets' names look like host and port because etcd 3.4 accepts no
	// other URLs.
	etcdSocket     = "etcd.sock:0"
	etcdPeerSocket = "etcd-peer.sock:0"
)

// etcdArgs has etcd listen on unix sockets only: nobody else can reach it, and
// no port can be taken by someone else while it is down. Nothing is synced to
// disk, since the data does not outlive the machine anyway.
func etcdArgs(quota int64) []string {
	client, peer := "unix://"+etcdSocket, "unix://"+etcdPeerSocket
	return []string{
		"--name=etcd",
		"--data-dir=" + etcdData,
		"--listen-client-urls=" + client,
		"--advertise-client-urls=" + client,
		"--listen-peer-urls=" + peer,
		"--initial-advertise-peer-urls=" + peer,
		"--initial-cluster=etcd=" + peer,
		"--unsafe-no-fsync",
		fmt.Sprintf("--quota-backend-bytes=%d", quota),
		"--logger=zap",
		"--log-level=warn",
	}
}

func apiServerArgs(port int) []string {
	return []string{
		"--etcd-servers=unix://" + etcdSocket,
		"--bind-address=127.0.0.1",
		fmt.Sprintf("--secure-port=%d", port),
		// Without it the server looks for a default route, which a machine
		// without network lacks.
		"--advertise-address=127.0.0.1",
		// A loopback address is not allowed in Endpoints.
		"--endpoint-reconciler-type=none",
		"--tls-cert-file=" + servingCertFile,
		"--tls-private-key-file=" + servingKeyFile,
		"--client-ca-file=" + authorityFile,
		"--token-auth-file=" + tokenFile,
		"--authorization-mode=Node,RBAC",
		"--enable-admission-plugins=NodeRestriction",
		"--service-account-issuer=" + accountIssuer,
		"--service-account-key-file=" + accountKeyFile,
		"--service-account-signing-key-file=" + accountKeyFile,
		"--service-cluster-ip-range=10.96.0.0/16",
		"--allow-privileged=true",
		"--profiling=false",
		"--audit-policy-file=" + auditPolicyFile,
		"--audit-log-path=" + auditLogFile,
		// Blocking: what a client has seen answered is in the file.
		"--audit-log-mode=blocking",
		// Zero: never rotated.
		"--audit-log-maxsize=0",
	}
}

// controllerManagerArgs leaves out the controllers that take a missing kubelet
// for a dead node and delete its Pods, and with them the tokens that are bound
// to the Pods. The client limits are raised so that thousands of namespaces get
// their ServiceAccounts quickly.
func controllerManagerArgs() []string {
	return []string{
		"--kubeconfig=" + managerKubeconfig,
		"--secure-port=0",
		"--leader-elect=false",
		// By default a folder of the host, which the controller manager creates.
		"--flex-volume-plugin-dir=flexvolume",
		"--use-service-account-credentials=true",
		"--service-account-private-key-file=" + accountKeyFile,
		"--root-ca-file=" + authorityFile,
		"--controllers=*,-node-lifecycle-controller,-taint-eviction-controller,-pod-garbage-collector-controller",
		"--kube-api-qps=500",
		"--kube-api-burst=1000",
		"--profiling=false",
	}
}

// prober asks a component how it is.
type prober struct {
	url    string
	token  string
	client *http.Client
}

func newProber(url, token string, ca *authority) *prober {
	return &prober{url: url, token: token, client: &http.Client{
		Timeout:   5 * time.Second,
		Transport: &http.Transport{TLSClientConfig: ca.clientTLS()},
	}}
}

// ready returns nil when the API server says that it can serve. Otherwise, the
// error lists what it still waits for.
func (p *prober) ready(ctx context.Context) error {
	_, err := p.get(ctx, "/readyz")
	return err
}

// get returns what the component answers to a path, with an error where that is
// not 200.
func (p *prober) get(ctx context.Context, path string) (string, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, p.url+path, nil)
	if err != nil {
		return "", fmt.Errorf("build a probe: %w", err)
	}
	req.Header.Set("Authorization", "Bearer "+p.token)
	resp, err := p.client.Do(req)
	if err != nil {
		return "", fmt.Errorf("probe %s: %w", path, err)
	}
	defer func() { _ = resp.Body.Close() }()
	text, err := io.ReadAll(resp.Body)
	if err != nil {
		return "", fmt.Errorf("probe %s: %w", path, err)
	}
	if resp.StatusCode != http.StatusOK {
		return "", fmt.Errorf("probe %s: %s: %s", path, resp.Status, text)
	}
	return string(text), nil
}

func (p *prober) close() {
	p.client.CloseIdleConnections()
}
