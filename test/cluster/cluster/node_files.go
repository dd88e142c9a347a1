package cluster

import (
	"archive/tar"
	"bytes"
	"context"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
)

// Files of a node, by their paths in it. Constant paths, and short ones: some
// are names of sockets.
const (
	filesFolder          = "/run/node"
	initDone             = filesFolder + "/init.done"
	pauseProgram         = filesFolder + "/pause"
	pauseImageFile       = filesFolder + "/pause.tar"
	containerdConfigFile = filesFolder + "/containerd.toml"
	containerdSocket     = "/run/containerd/containerd.sock"
	networkFolder        = filesFolder + "/cni"
	registriesFolder     = filesFolder + "/registries"
	kubeletConfigFile    = filesFolder + "/kubelet.yaml"
	kubeletKubeconfig    = filesFolder + "/kubeconfig"
	kubeletCert          = filesFolder + "/kubelet.crt"
	kubeletKey           = filesFolder + "/kubelet.key"
	kubeletAuthority     = filesFolder + "/ca.crt"
)

// PauseImageName is the name of the image that a node has from the start, that
// of PauseImage. A container of it must have the pull policy Never or
// IfNotPresent.
const PauseImageName = "cluster.invalid/pause:v1"

// privateFolders are those that a node has for itself.
func privateFolders() []string {
	return []string{"/run", "/var/lib", "/var/log"}
}

// initScript is the first process of a node. The kubelet would set the kernel's
// parameters that it wants, for the whole machine; here it finds them set.
const initScript = `
mount -t proc proc /proc
while read -r parameter value; do
	file=` + filesFolder + `/${parameter##*/}
	echo "$value" >"$file"
	mount --bind "$file" "/proc/sys/$parameter"
done <<END
vm/overcommit_memory 1
vm/panic_on_oom 0
kernel/panic 10
kernel/panic_on_oops 1
kernel/keys/root_maxkeys 1000000
kernel/keys/root_maxbytes 25000000
END
: >` + initDone + `
exec ` + pauseProgram + `
`

// containerdConfig has a default of registries on a port where nobody listens,
// so that no name of a registry is looked up anywhere. The restricted
// adjustment is for a machine without CAP_SYS_RESOURCE, where runc fails
// otherwise. An AppArmor profile would stay loaded.
func containerdConfig(programs hostPrograms) string {
	return fmt.Sprintf(`
version = 3
disabled_plugins = ["io.containerd.internal.v1.opt"]

[plugins."io.containerd.cri.v1.images".pinned_images]
  sandbox = %q
[plugins."io.containerd.cri.v1.images".registry]
  config_path = %q

[plugins."io.containerd.cri.v1.runtime"]
  restrict_oom_score_adj = true
  disable_apparmor = true
  use_internal_loopback = true
[plugins."io.containerd.cri.v1.runtime".cni]
  bin_dirs = [%q]
  conf_dir = %q
[plugins."io.containerd.cri.v1.runtime".containerd.runtimes.runc]
  runtime_type = "io.containerd.runc.v2"
[plugins."io.containerd.cri.v1.runtime".containerd.runtimes.runc.options]
  BinaryName = %q
`, PauseImageName, registriesFolder, programs.plugins, networkFolder, programs.runc)
}

// network gives a Pod an address, which its status must have, but no interface
// that would have it. The range is the kernel's own: what is sent to it never
// leaves the machine.
const network = `{"cniVersion": "1.0.0", "name": "none", "plugins": [{
	"type": "host-local",
	"ipam": {"type": "host-local", "ranges": [[{"subnet": "127.77.0.0/16"}]], "dataDir": "` + filesFolder + `/addresses"}
}]}`

type kubeletSettings struct {
	port     int
	cgroup   string
	cgroupV1 bool
}

// config waits for nothing, limits no pulls, and touches nothing of the machine:
// no iptables, no eviction because its disk is full, no DNS.
func (s kubeletSettings) config() string {
	return fmt.Sprintf(`
apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
address: 127.0.0.1
port: %d
healthzPort: 0
tlsCertFile: `+kubeletCert+`
tlsPrivateKeyFile: `+kubeletKey+`
authentication:
  anonymous: {enabled: false}
  webhook: {enabled: true}
  x509: {clientCAFile: `+kubeletAuthority+`}
authorization: {mode: Webhook}
containerRuntimeEndpoint: unix://`+containerdSocket+`
cgroupRoot: /%s
cgroupDriver: cgroupfs
failCgroupV1: %t
failSwapOn: false
localStorageCapacityIsolation: false
evictionHard: {memory.available: "0%%", nodefs.available: "0%%", nodefs.inodesFree: "0%%", imagefs.available: "0%%", imagefs.inodesFree: "0%%"}
imageGCHighThresholdPercent: 100
makeIPTablesUtilChains: false
resolvConf: ""
volumePluginDir: /var/lib/kubelet/volume-plugins
registryPullQPS: 0
serializeImagePulls: false
maxPods: 250
syncFrequency: 10s
nodeStatusUpdateFrequency: 5s
`, s.port, s.cgroup, !s.cgroupV1)
}

// writeFiles writes what the processes of the node are started with.
func (n *Node) writeFiles(ctx context.Context, programs hostPrograms, kubelet kubeletSettings) error {
	program, err := buildPause(ctx, filepath.Join(n.dir, pauseProgram))
	if err != nil {
		return err
	}
	image, err := ProgramImage("pause", program)
	if err != nil {
		return err
	}
	reference, err := name.NewTag(PauseImageName)
	if err != nil {
		return fmt.Errorf("name the sandbox image: %w", err)
	}
	if err := tarball.WriteToFile(filepath.Join(n.dir, pauseImageFile), reference, image); err != nil {
		return fmt.Errorf("write the sandbox image: %w", err)
	}
	serving, err := n.cluster.authority.serving("kubelet")
	if err != nil {
		return err
	}
	user, err := n.cluster.ConfigForUser("system:node:"+n.name, "system:nodes")
	if err != nil {
		return err
	}
	if err := n.cluster.WriteKubeconfig(filepath.Join(n.dir, kubeletKubeconfig), user); err != nil {
		return err
	}
	for path, content := range map[string]string{
		containerdConfigFile:             containerdConfig(programs),
		networkFolder + "/none.conflist": network,
		kubeletConfigFile:                kubelet.config(),
		kubeletCert:                      string(serving.cert),
		kubeletKey:                       string(serving.key),
		kubeletAuthority:                 string(n.cluster.authority.pem),
	} {
		if err := n.write(path, content); err != nil {
			return err
		}
	}
	const nobody = "127.0.0.1:1"
	return n.SetRegistry("_default", nobody)
}

// SetRegistry has the node reach a registry host, such as
// registry.example:5000, at an address on loopback, over plain HTTP. It holds
// from the next pull on. A host that was never set cannot be reached.
func (n *Node) SetRegistry(host, address string) error {
	return n.write(filepath.Join(registriesFolder, host, "hosts.toml"), fmt.Sprintf(`
server = "http://%s"
[host."http://%s"]
  capabilities = ["pull", "resolve"]
`, address, address))
}

// write writes a file into one of the node's own folders.
func (n *Node) write(path, content string) error {
	path = filepath.Join(n.dir, path)
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return fmt.Errorf("write a file of node %q: %w", n.name, err)
	}
	if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
		return fmt.Errorf("write a file of node %q: %w", n.name, err)
	}
	return nil
}

// PauseImage builds an image for containers of tests. Its one program waits for
// the signal to end, and needs nothing from anybody.
func PauseImage(ctx context.Context) (v1.Image, error) {
	dir, err := os.MkdirTemp("", "imps-pause-")
	if err != nil {
		return nil, fmt.Errorf("create a build folder: %w", err)
	}
	defer func() { _ = os.RemoveAll(dir) }()
	program, err := buildPause(ctx, filepath.Join(dir, "pause"))
	if err != nil {
		return nil, err
	}
	return ProgramImage("pause", program)
}

// buildPause builds test/cluster/pause and returns its content.
func buildPause(ctx context.Context, path string) ([]byte, error) {
	_, err := goOutput(ctx, "", "build", "-trimpath", "-buildvcs=false", "-ldflags=-s -w", "-o", path, rootModule+"/test/cluster/pause")
	if err != nil {
		return nil, err
	}
	return os.ReadFile(path) //nolint:gosec // what was just built
}

// ProgramImage makes an image of a static program alone, which it starts. path
// is without the first slash.
func ProgramImage(path string, program []byte) (v1.Image, error) {
	var files bytes.Buffer
	writer := tar.NewWriter(&files)
	if err := writer.WriteHeader(&tar.Header{Name: path, Mode: 0o755, Size: int64(len(program))}); err != nil {
		return nil, fmt.Errorf("pack an image: %w", err)
	}
	if _, err := writer.Write(program); err != nil {
		return nil, fmt.Errorf("pack an image: %w", err)
	}
	if err := writer.Close(); err != nil {
		return nil, fmt.Errorf("pack an image: %w", err)
	}
	layer, err := tarball.LayerFromOpener(func() (io.ReadCloser, error) {
		return io.NopCloser(bytes.NewReader(files.Bytes())), nil
	})
	if err != nil {
		return nil, fmt.Errorf("pack an image: %w", err)
	}
	image, err := mutate.AppendLayers(empty.Image, layer)
	if err != nil {
		return nil, fmt.Errorf("pack an image: %w", err)
	}
	config, err := image.ConfigFile()
	if err != nil {
		return nil, fmt.Errorf("pack an image: %w", err)
	}
	config = config.DeepCopy()
	config.OS, config.Architecture = "linux", runtime.GOARCH
	config.Config.Entrypoint = []string{"/" + path}
	return mutate.ConfigFile(image, config)
}
