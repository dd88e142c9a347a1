package main

import (
	"bytes"
	"context"
	"encoding/base64"
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

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/imps-node/imps/pkg/api/v1alpha1"
)

const (
	// stopTimeout is how long a process may take to end; imps promises five seconds.
	stopTimeout = 10 * time.Second
	// logLines are shown of each log after a failure.
	logLines = 12
)

var nodes = []string{"node-a", "node-b"}

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
	deployment, err := d.client.AppsV1().Deployments(systemNamespace).Get(ctx, "imps-coordinator", metav1.GetOptions{})
	if err != nil {
		return fmt.Errorf("read the coordinator's Deployment: %w", err)
	}
	token, err := d.control.Token(ctx, systemNamespace, deployment.Spec.Template.Spec.ServiceAccountName)
	if err != nil {
		return err
	}
	for _, node := range nodes {
		if err := d.control.Node(ctx, node); err != nil {
			return err
		}
	}
	if err := d.launch(ctx, "coordinator", token, deployment.Spec.Template.Spec.Containers[0].Args); err != nil {
		return err
	}
	d.say("   coordinator   ServiceAccount %s", deployment.Spec.Template.Spec.ServiceAccountName)
	// Not before it leads: a demonstration shows what takes how long once everything stands.
	if err := eventually(ctx, "the resource has a status", func(ctx context.Context) error {
		return d.resourceIs(ctx, v1alpha1.StatusReady, 0)
	}); err != nil {
		return err
	}

	daemonSet, err := d.client.AppsV1().DaemonSets(systemNamespace).Get(ctx, "imps-node", metav1.GetOptions{})
	if err != nil {
		return fmt.Errorf("read the agents' DaemonSet: %w", err)
	}
	for _, node := range nodes {
		token, err := d.control.NodeToken(ctx, systemNamespace, daemonSet.Spec.Template.Spec.ServiceAccountName, node)
		if err != nil {
			return err
		}
		if err := d.launch(ctx, "agent-"+node, token, daemonSet.Spec.Template.Spec.Containers[0].Args, "NODE_NAME="+node); err != nil {
			return err
		}
		d.say("   agent-%s  ServiceAccount %s, its token bound to a Pod on %s", node, daemonSet.Spec.Template.Spec.ServiceAccountName, node)
	}
	d.say("   all run with the arguments that the chart gives them, and say that they are ready")
	return nil
}

// launch starts an imps-node as a container of the chart would be, and waits until it is ready.
func (d *demo) launch(ctx context.Context, name, token string, args []string, env ...string) error {
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
	// Ports that are free; the log says which.
	args = append(args, "--kubeconfig="+kubeconfig, "--metrics-addr=127.0.0.1:0", "--health-addr=localhost:0", "--log-format=text")
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
		_ = p.cmd.Wait() // ProcessState has it all
		if lifetime.Err() == nil {
			d.died(fmt.Errorf("%s ended on its own: %s", name, p.cmd.ProcessState))
		}
		close(p.done)
	}()
	return eventually(ctx, name+" is ready", p.ready)
}

// ready asks the process's own probe.
func (p *process) ready(ctx context.Context) error {
	address := p.address("healthAddr")
	if address == "" {
		return errors.New("its log has no healthAddr yet")
	}
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+address+"/readyz", nil)
	if err != nil {
		return err
	}
	answer, err := http.DefaultClient.Do(request)
	if err != nil {
		return err
	}
	defer func() { _ = answer.Body.Close() }()
	if answer.StatusCode != http.StatusOK {
		return fmt.Errorf("/readyz says %s", answer.Status)
	}
	return nil
}

// address returns an address of which the process logged that it listens there.
func (p *process) address(key string) string {
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

// stopProcesses ends all processes as Kubernetes does: SIGTERM, and time to finish.
func (d *demo) stopProcesses() {
	for _, p := range d.processes {
		p.stop()
	}
	for _, p := range d.processes {
		<-p.done
		d.check(p.name+" ends on SIGTERM with exit code 0", "exit status 0", p.cmd.ProcessState)
	}
}

// showLogs prints the end of every log.
func (d *demo) showLogs() {
	for _, p := range d.processes {
		d.say("\n   The log of %s ends:", p.name)
		text, err := os.ReadFile(p.log)
		if err != nil {
			d.say("   %v", err)
			continue
		}
		lines := strings.Split(strings.TrimRight(string(text), "\n"), "\n")
		for _, line := range lines[max(0, len(lines)-logLines):] {
			d.say("   | %s", line)
		}
	}
}

// findPasswords looks for the credentials where they must not be.
func (d *demo) findPasswords() {
	if len(d.processes) == 0 {
		return
	}
	var found []string
	for _, p := range d.processes {
		text, err := os.ReadFile(p.log)
		if err != nil {
			found = append(found, err.Error())
		}
		for _, password := range d.used {
			for _, form := range []string{password, base64.StdEncoding.EncodeToString([]byte(password)), base64.StdEncoding.EncodeToString([]byte(user + ":" + password))} {
				if bytes.Contains(text, []byte(strings.TrimRight(form, "="))) {
					found = append(found, "a password in the log of "+p.name)
				}
			}
		}
	}
	d.check("no log holds a password, in clear or in base64", "[]", found)
}
