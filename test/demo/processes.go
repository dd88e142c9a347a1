package main

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/imps-node/imps/pkg/api/v1alpha1"
)

const (
	// stopTimeout is how long a process may take to end; imps promises five seconds.
	stopTimeout = 10 * time.Second
	// logLines are shown of each log after a failure.
	logLines = 12
)

// process is an imps-node that runs.
type process struct {
	name string
	log  string // path
	cmd  *exec.Cmd
	stop context.CancelFunc // sends SIGTERM
	done chan struct{}      // closed when it has ended
}

// start starts the coordinator and, once it has taken the resource over, an agent for each node.
func (d *demo) start(ctx context.Context) error {
	nodes := []string{"node-a", "node-b"}
	for _, node := range nodes {
		if err := d.control.Node(ctx, node); err != nil {
			return err
		}
	}
	deployment, err := d.client.AppsV1().Deployments(systemNamespace).Get(ctx, coordinatorName, metav1.GetOptions{})
	if err != nil {
		return fmt.Errorf("read the coordinator's Deployment: %w", err)
	}
	token, err := d.control.Token(ctx, systemNamespace, coordinatorName)
	if err != nil {
		return err
	}
	if err := d.launch(ctx, "coordinator", token, deployment.Spec.Template.Spec); err != nil {
		return err
	}
	// Otherwise the first times would tell how long it takes to be elected.
	if err := d.awaitStatus(ctx, v1alpha1.StatusReady, 0); err != nil {
		return err
	}
	d.say("   coordinator   token of ServiceAccount %s", coordinatorName)

	daemonSet, err := d.client.AppsV1().DaemonSets(systemNamespace).Get(ctx, agentName, metav1.GetOptions{})
	if err != nil {
		return fmt.Errorf("read the agents' DaemonSet: %w", err)
	}
	for _, node := range nodes {
		token, err := d.control.NodeToken(ctx, systemNamespace, agentName, node)
		if err != nil {
			return err
		}
		if err := d.launch(ctx, "agent-"+node, token, daemonSet.Spec.Template.Spec, "NODE_NAME="+node); err != nil {
			return err
		}
		d.say("   agent-%s  token of ServiceAccount %s, bound to a Pod on %s", node, agentName, node)
	}
	d.note("Each runs with the arguments that the chart gives it, and says that it is ready.")
	return nil
}

// launch starts an imps-node as the container of a Pod would be, and waits until it is ready.
func (d *demo) launch(ctx context.Context, name, token string, pod corev1.PodSpec, env ...string) error {
	kubeconfig := filepath.Join(d.dir, name+".kubeconfig")
	if err := d.control.WriteKubeconfig(kubeconfig, d.control.ConfigForToken(token)); err != nil {
		return err
	}
	p := &process{name: name, log: filepath.Join(d.dir, name+".log"), done: make(chan struct{})}
	log, err := os.Create(p.log)
	if err != nil {
		return fmt.Errorf("create the log of %s: %w", name, err)
	}
	defer func() { _ = log.Close() }() // the process has its own copy

	// It outlives the steps, and is stopped when they are over.
	lifetime, stop := context.WithCancel(context.WithoutCancel(ctx))
	p.stop = stop
	// Any free ports; the log says which.
	args := append(pod.Containers[0].Args,
		"--kubeconfig="+kubeconfig, "--metrics-addr=127.0.0.1:0", "--health-addr=127.0.0.1:0", "--log-format=text")
	p.cmd = exec.CommandContext(lifetime, d.binary, args...) //nolint:gosec // the binary that was just built
	p.cmd.Dir = d.dir
	p.cmd.Stdout, p.cmd.Stderr = log, log
	// Nothing of the caller's settings reaches it.
	p.cmd.Env = append([]string{"POD_NAMESPACE=" + systemNamespace}, env...)
	p.cmd.SysProcAttr = tie()
	p.cmd.Cancel = func() error { return p.cmd.Process.Signal(syscall.SIGTERM) }
	p.cmd.WaitDelay = stopTimeout
	if err := p.cmd.Start(); err != nil {
		stop()
		return fmt.Errorf("start %s: %w", name, err)
	}
	d.processes = append(d.processes, p)
	go func() {
		defer close(p.done)
		_ = p.cmd.Wait() // ProcessState tells all of it
		if lifetime.Err() == nil {
			d.died(fmt.Errorf("%s ended on its own: %s", name, p.cmd.ProcessState))
		}
	}()
	return eventually(ctx, name+" is ready", p.ready)
}

// ready asks the process's own probe.
func (p *process) ready(ctx context.Context) error {
	address := p.logged("healthAddr")
	if address == "" {
		return errors.New("its log has no healthAddr")
	}
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+address+"/readyz", nil)
	if err != nil {
		return fmt.Errorf("ask whether it is ready: %w", err)
	}
	answer, err := http.DefaultClient.Do(request)
	if err != nil {
		return fmt.Errorf("ask whether it is ready: %w", err)
	}
	defer func() { _ = answer.Body.Close() }()
	if answer.StatusCode != http.StatusOK {
		return fmt.Errorf("/readyz says %s", answer.Status)
	}
	return nil
}

// logged returns the first value that the process logged for a key, empty where there is none yet.
func (p *process) logged(key string) string {
	text, err := os.ReadFile(p.log)
	if err != nil {
		return ""
	}
	match := regexp.MustCompile(`\b` + key + `=(\S+)`).FindSubmatch(text)
	if match == nil {
		return ""
	}
	return string(match[1])
}

// stopProcesses ends all processes as Kubernetes does: SIGTERM, and time to finish. Where anything
// failed, it shows the end of every log.
func (d *demo) stopProcesses(interrupted bool) {
	for _, p := range d.processes {
		p.stop()
	}
	for _, p := range d.processes {
		<-p.done
		if !interrupted {
			d.check(p.name+" ends on SIGTERM with exit code 0", "exit status 0", p.cmd.ProcessState)
		}
	}
	if interrupted || d.failures() == 0 {
		return
	}
	for _, p := range d.processes {
		text, err := os.ReadFile(p.log)
		if err != nil {
			text = []byte(err.Error())
		}
		lines := strings.Split(strings.TrimSpace(string(text)), "\n")
		d.say("\n   The log of %s ends:", p.name)
		for _, line := range lines[max(0, len(lines)-logLines):] {
			d.say("   | %s", line)
		}
	}
}
