// Package imps builds imps-node, installs it on a control plane of test/cluster and runs
// it there as the chart would: as processes of their own, with the chart's arguments and
// the tokens of the chart's ServiceAccounts.
package imps

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"

	"github.com/imps-node/imps/test/cluster/cluster"
)

// The names of the chart's defaults.
const (
	SystemNamespace   = "imps-system"
	RenderedNamespace = "imps-rendered"
	SourceNamespace   = "registry-access"
	SecretName        = "imps-pull-secret"

	// CoordinatorAccount and AgentAccount are the ServiceAccounts of the two duties, and
	// the names of their workloads.
	CoordinatorAccount = "imps-coordinator"
	AgentAccount       = "imps-node"
)

// Root returns the folder of this repository, from anywhere in it.
func Root(ctx context.Context) (string, error) {
	out, err := output(ctx, "go", "list", "-m", "-f", "{{.Dir}}", "github.com/imps-node/imps")
	return strings.TrimSpace(string(out)), err
}

// Build builds imps-node into a folder, with more arguments for go build ("-race", say),
// and returns the binary's path.
// root is the folder of the repository.
func Build(ctx context.Context, root, dir string, args ...string) (string, error) {
	return BuildCommand(ctx, root, dir, "imps-node", args...)
}

// BuildCommand does the same with any command of the repository.
func BuildCommand(ctx context.Context, root, dir, command string, args ...string) (string, error) {
	path, err := filepath.Abs(filepath.Join(dir, command))
	if err != nil {
		return "", err
	}
	args = append([]string{"-C", root, "build", "-buildvcs=false", "-o", path}, args...)
	_, err = output(ctx, "go", append(args, "./cmd/"+command)...)
	return path, err
}

// Install applies the CRD and what the chart renders with these values ("key=value").
// root is the folder of the repository.
func Install(ctx context.Context, root string, control *cluster.Cluster, values ...string) error {
	crds, err := os.ReadFile(filepath.Join(root, "deploy/daemonset/crds/images.banzaicloud.io_imagepullsecrets.yaml")) //nolint:gosec // of the repository
	if err != nil {
		return err
	}
	if err := control.Apply(ctx, crds); err != nil {
		return err
	}
	// The garbage collector looks for new kinds every 30 s only, a new one at once. Until
	// then, what belongs to a resource is neither collected nor orphaned.
	if err := control.RestartControllerManager(ctx); err != nil {
		return err
	}
	helm, err := output(ctx, filepath.Join(root, "hack/tool"), "helm")
	if err != nil {
		return err
	}
	args := []string{
		"template", "imps-node", filepath.Join(root, "deploy/daemonset"), "--namespace", SystemNamespace,
		"--set", "createNamespaces.release=true,createNamespaces.sources=true",
	}
	for _, value := range values {
		args = append(args, "--set", value)
	}
	manifests, err := output(ctx, strings.TrimSpace(string(helm)), args...)
	if err != nil {
		return err
	}
	return control.Apply(ctx, manifests)
}

// Coordinator is the cluster duty as the chart runs it. It needs Install before.
func Coordinator(ctx context.Context, control *cluster.Cluster) (Spec, error) {
	client, err := kubernetes.NewForConfig(control.Admin())
	if err != nil {
		return Spec{}, err
	}
	deployment, err := client.AppsV1().Deployments(SystemNamespace).Get(ctx, CoordinatorAccount, metav1.GetOptions{})
	if err != nil {
		return Spec{}, fmt.Errorf("read the coordinator's Deployment: %w", err)
	}
	token, err := control.Token(ctx, SystemNamespace, CoordinatorAccount)
	if err != nil {
		return Spec{}, err
	}
	return Spec{Name: "coordinator", Args: deployment.Spec.Template.Spec.Containers[0].Args, Config: control.ConfigForToken(token)}, nil
}

// Agent is the node duty of a node as the chart runs it. It makes the Node where there is
// none, and needs Install before.
func Agent(ctx context.Context, control *cluster.Cluster, node string) (Spec, error) {
	client, err := kubernetes.NewForConfig(control.Admin())
	if err != nil {
		return Spec{}, err
	}
	daemonSet, err := client.AppsV1().DaemonSets(SystemNamespace).Get(ctx, AgentAccount, metav1.GetOptions{})
	if err != nil {
		return Spec{}, fmt.Errorf("read the agents' DaemonSet: %w", err)
	}
	if err := control.Node(ctx, node); err != nil {
		return Spec{}, err
	}
	token, err := control.NodeToken(ctx, SystemNamespace, AgentAccount, node)
	if err != nil {
		return Spec{}, err
	}
	return Spec{
		Name: "agent-" + node, Args: daemonSet.Spec.Template.Spec.Containers[0].Args, Env: []string{"NODE_NAME=" + node},
		Config: control.ConfigForToken(token),
	}, nil
}

// output runs a program and returns what it printed.
func output(ctx context.Context, name string, args ...string) ([]byte, error) {
	command := exec.CommandContext(ctx, name, args...) //nolint:gosec // a tool of the repository
	var stderr bytes.Buffer
	command.Stderr = &stderr
	out, err := command.Output()
	if err != nil {
		return nil, errors.Join(fmt.Errorf("%s %s: %w", name, strings.Join(args, " "), err), errors.New(stderr.String()))
	}
	return out, nil
}
