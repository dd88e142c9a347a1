package cluster

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"sync"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// NodeConfig says how a node is set up.
type NodeConfig struct {
	// Name is the name of the Node object. It must be given.
	Name string

	// CredentialProviderConfig is the path of the kubelet's
	// CredentialProviderConfig, a file or a folder, and CredentialProviderBinDir
	// the folder of the programs that it names. Both, or none; outside of the
	// folders that a node has for itself. The kubelet reads them when it starts.
	CredentialProviderConfig string
	CredentialProviderBinDir string

	// Registries has an address on loopback, such as 127.0.0.1:4711, for each
	// registry host; see SetRegistry.
	Registries map[string]string
}

// Node is a node that runs: containerd and a kubelet, as processes that share
// a PID namespace and a mount namespace of their own. However the node ends,
// the kernel ends all that ran in it, and unmounts what was mounted.
//
// In the node, /run, /var/lib and /var/log are folders of its own, for Pods
// with hostPath volumes too; everything else is the machine's.
// A Pod has a network namespace of its own, as usual, but no network: there is
// nothing in it but loopback, and the Pod's address only tells it apart. With
// hostNetwork it has the machine's.
type Node struct {
	name     string
	cluster  *Cluster
	dir      string
	cgroup   string
	launcher *launcher
	probe    *prober

	init, containerd, kubelet *process

	stop func() error // Stop's body, run once
}

// nodePackages are Debian's packages of the programs that a node needs.
const nodePackages = "runc containernetworking-plugins"

// hostPrograms are what a node needs that is not built here.
type hostPrograms struct {
	runc string
	// plugins is the folder with CNI's.
	plugins string
}

func findHostPrograms() (hostPrograms, error) {
	if err := canIsolate(); err != nil {
		return hostPrograms{}, err
	}
	find := func(name string, folders ...string) string {
		for _, folder := range folders {
			if path := filepath.Join(folder, name); exists(path) {
				return path
			}
		}
		return ""
	}
	// Not every PATH has the folders for root.
	runc := find("runc", append(filepath.SplitList(os.Getenv("PATH")), "/usr/sbin", "/sbin")...)
	plugin := find("host-local", "/usr/lib/cni", "/usr/libexec/cni", "/opt/cni/bin")
	if runc == "" || plugin == "" {
		return hostPrograms{}, errors.New("a node needs runc and CNI's host-local; as root: apt-get install --no-install-recommends -y " + nodePackages)
	}
	return hostPrograms{runc: runc, plugins: filepath.Dir(plugin)}, nil
}

// CanStartNode returns why no node can run here, or nil.
func CanStartNode() error {
	_, err := findHostPrograms()
	return err
}

// StartNode builds what is missing, starts a node and returns when it is Ready.
// It needs root on Linux, and programs of Debian's packages runc and
// containernetworking-plugins. The first build takes some minutes; see Run.
//
// The context bounds the start only; the node ends with Stop, with the cluster,
// or with the process that runs it. There is no scheduler: a Pod has to name
// the node.
func (c *Cluster) StartNode(ctx context.Context, cfg NodeConfig) (*Node, error) {
	programs, err := findHostPrograms()
	if err != nil {
		return nil, err
	}
	binaries, err := BuildNode(ctx, c.progress)
	if err != nil {
		return nil, fmt.Errorf("provide the binaries of a node: %w", err)
	}
	n := &Node{
		name: cfg.Name, cluster: c, dir: c.dir.path("node-" + cfg.Name),
		cgroup: filepath.Base(c.dir.root) + "." + cfg.Name,
	}
	// Two of the same name would share it.
	if err := os.Mkdir(n.dir, 0o700); err != nil {
		return nil, fmt.Errorf("create the folder of node %q: %w", cfg.Name, err)
	}
	n.stop = sync.OnceValue(n.end)
	c.mu.Lock()
	c.nodes = append(c.nodes, n)
	c.mu.Unlock()
	if err := n.start(ctx, binaries, programs, cfg); err != nil {
		return nil, errors.Join(fmt.Errorf("start node %q: %w", cfg.Name, err), n.Stop())
	}
	return n, nil
}

func (n *Node) start(ctx context.Context, binaries NodeBinaries, programs hostPrograms, cfg NodeConfig) error {
	for _, folder := range append(privateFolders(), filesFolder) {
		if err := os.MkdirAll(filepath.Join(n.dir, folder), 0o700); err != nil {
			return fmt.Errorf("create its folders: %w", err)
		}
	}
	port, err := freePort(ctx)
	if err != nil {
		return err
	}
	n.probe = newProber(fmt.Sprintf("https://127.0.0.1:%d", port), n.cluster.admin.BearerToken, n.cluster.authority)
	cgroupV1, err := makeCgroup(n.cgroup)
	if err != nil {
		return fmt.Errorf("create its cgroup: %w", err)
	}
	if err := n.writeFiles(ctx, programs, kubeletSettings{port: port, cgroup: n.cgroup, cgroupV1: cgroupV1}); err != nil {
		return err
	}
	for host, address := range cfg.Registries {
		if err := n.SetRegistry(host, address); err != nil {
			return err
		}
	}

	if n.launcher, err = newLauncher(func() error { return isolate(n.dir) }); err != nil {
		return fmt.Errorf("isolate it: %w", err)
	}
	n.init = n.process("init", "/bin/sh", "-euc", initScript)
	n.init.untied = false
	if err := n.init.start(); err != nil {
		return err
	}
	if err := n.init.await(ctx, n.exists(initDone)); err != nil {
		return err
	}
	n.containerd = n.process("containerd", binaries.Containerd, "--config", containerdConfigFile)
	if err := n.containerd.start(); err != nil {
		return err
	}
	if err := n.containerd.await(ctx, n.exists(containerdSocket)); err != nil {
		return err
	}
	if err := n.run(ctx, binaries.Ctr, "--namespace", "k8s.io", "images", "import", pauseImageFile); err != nil {
		return fmt.Errorf("import the sandbox image: %w; containerd's log ends:\n%s", err, tail(n.containerd.log))
	}

	address, err := nodeAddress()
	if err != nil {
		return err
	}
	args := []string{
		"--config=" + kubeletConfigFile,
		"--kubeconfig=" + kubeletKubeconfig,
		"--hostname-override=" + n.name,
		// Otherwise it asks DNS for its own name.
		"--node-ip=" + address,
	}
	if cfg.CredentialProviderConfig != "" {
		args = append(args,
			"--image-credential-provider-config="+cfg.CredentialProviderConfig,
			"--image-credential-provider-bin-dir="+cfg.CredentialProviderBinDir)
	}
	n.kubelet = n.process("kubelet", binaries.Kubelet, args...)
	return n.StartKubelet(ctx)
}

func (n *Node) process(name Component, path string, args ...string) *process {
	return &process{
		name: name, path: path, args: args, lifetime: n.cluster.lifetime, launcher: n.launcher, untied: true,
		dir: n.dir, log: n.cluster.dir.path(n.name + "-" + string(name) + ".log"),
	}
}

// run runs a program in the node until it ends.
func (n *Node) run(ctx context.Context, path string, args ...string) error {
	var out bytes.Buffer
	cmd := exec.CommandContext(ctx, path, args...) //nolint:gosec // one of the node's own programs
	cmd.Stdout, cmd.Stderr = &out, &out
	err := n.launcher.start(cmd)
	if err == nil {
		err = cmd.Wait()
	}
	if err != nil {
		return fmt.Errorf("%w: %s", err, out.Bytes())
	}
	return nil
}

// exists returns a check for a file in one of the node's own folders.
func (n *Node) exists(path string) func(context.Context) error {
	return func(context.Context) error {
		_, err := os.Stat(filepath.Join(n.dir, path))
		return err
	}
}

// nodeAddress returns an address of this machine for the Node's status: the
// kubelet refuses one on loopback. Nothing listens there.
func nodeAddress() (string, error) {
	addresses, err := net.InterfaceAddrs()
	if err != nil {
		return "", fmt.Errorf("list the addresses of this machine: %w", err)
	}
	for _, address := range addresses {
		if network, ok := address.(*net.IPNet); ok && network.IP.IsGlobalUnicast() {
			return network.IP.String(), nil
		}
	}
	return "", errors.New("a kubelet needs an address besides loopback, and this machine has none")
}

// Name returns the name of the Node object.
func (n *Node) Name() string {
	return n.name
}

// Log returns the path of the kubelet's log, which goes with the cluster.
func (n *Node) Log() string {
	return n.kubelet.log
}

// Metrics returns the kubelet's own metrics, in Prometheus' text format.
func (n *Node) Metrics(ctx context.Context) (string, error) {
	return n.probe.get(ctx, "/metrics")
}

// StartKubelet starts a kubelet that was killed, and returns when it works and
// the Node is Ready.
func (n *Node) StartKubelet(ctx context.Context) error {
	if err := n.kubelet.start(); err != nil {
		return err
	}
	return n.kubelet.await(ctx, func(ctx context.Context) error {
		if _, err := n.probe.get(ctx, "/healthz"); err != nil {
			return err
		}
		node, err := n.cluster.client.CoreV1().Nodes().Get(ctx, n.name, metav1.GetOptions{})
		if err != nil {
			return err
		}
		if !slices.ContainsFunc(node.Status.Conditions, func(c corev1.NodeCondition) bool {
			return c.Type == corev1.NodeReady && c.Status == corev1.ConditionTrue
		}) {
			return fmt.Errorf("the Node is not Ready: %v", node.Status.Conditions)
		}
		return nil
	})
}

// KillKubelet kills the kubelet as a crash would, and returns when it is gone.
// The Pods run on. It returns an ErrNotRunning when it is down already.
func (n *Node) KillKubelet() error {
	if !n.kubelet.kill() {
		return fmt.Errorf("kill the kubelet of %q: %w", n.name, ErrNotRunning)
	}
	return nil
}

// RestartKubelet kills the kubelet and starts it again, so that it reads its
// credential providers' configuration anew.
func (n *Node) RestartKubelet(ctx context.Context) error {
	if err := n.KillKubelet(); err != nil {
		return err
	}
	return n.StartKubelet(ctx)
}

// Stop ends the node as a loss of power would, with everything that runs on it,
// and leaves nothing of it on this machine but the logs. Its Node and Pods stay
// in the API. Calls after the first do nothing and return what the first
// returned.
func (n *Node) Stop() error {
	return n.stop()
}

func (n *Node) end() error {
	// The first process of a PID namespace is gone only when all others are.
	for _, p := range []*process{n.init, n.containerd, n.kubelet} {
		if p != nil {
			p.kill()
		}
	}
	if n.launcher != nil {
		n.launcher.close()
	}
	if n.probe != nil {
		n.probe.close()
	}
	err := removeCgroups(n.cgroup)
	if !n.cluster.dir.keep {
		err = errors.Join(err, os.RemoveAll(n.dir))
	}
	if err != nil {
		return fmt.Errorf("clean up after node %q: %w", n.name, err)
	}
	return nil
}
