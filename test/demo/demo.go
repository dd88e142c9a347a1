package main

import (
	"context"
	"fmt"
	"net/http/httptest"
	"os"
	"sync/atomic"
	"time"

	"k8s.io/client-go/kubernetes"

	"github.com/imps-node/imps/test/cluster/cluster"
	"github.com/imps-node/imps/test/fakeaws"
	"github.com/imps-node/imps/test/imps"
	"github.com/imps-node/imps/test/registry"
)

const (
	// within bounds every wait for something that should take milliseconds.
	within = 20 * time.Second
	// pollInterval is the pause between two looks; times are taken elsewhere.
	pollInterval = 10 * time.Millisecond
)

// demo is one run.
type demo struct {
	printer
	step    int
	keep    bool // leave everything running until Ctrl-C
	waiting bool // for that Ctrl-C

	control   *cluster.Cluster
	client    *kubernetes.Clientset
	dir       string // holds the binary, the kubeconfigs and the logs
	binary    string
	processes []*imps.Process
	stopping  atomic.Bool             // the processes are told to end
	died      context.CancelCauseFunc // ends the run when a process ends on its own

	passwords    passwords // the current ones
	watcher      *watcher
	mark         cluster.Mark // of the audit log before the first trigger
	served       []*subject   // the namespaces that have the Secret
	aws          *fakeaws.Server
	awsServer    *httptest.Server
	distribution string // the registry's binary
	registry     *registry.Registry

	foreignAt string // the resourceVersion of the Secret that is not imps's
	checks    []check
}

type step struct {
	title string
	run   func(context.Context) error
}

// steps are what the audience sees, in this order.
func (d *demo) steps() []step {
	steps := []step{
		{"A real control plane", d.boot},
		{"imps, built from this source, and its chart", d.install},
		{"Two sources, and an ImagePullSecret with every kind of selector", d.create},
		{"A coordinator and two agents, each with its own identity", d.start},
		{"Secrets reach the selected namespaces", d.deliver},
		{"What the resource says", d.status},
		{"A Secret of that name that is not imps's", d.foreign},
		{"A source is rotated", d.rotate},
		{"Namespaces are deselected", d.prune},
	}
	if d.keep {
		return append(steps, step{"What it took", d.account}, step{accountsTitle, d.attach}, step{ecrTitle, d.ecr}, step{nodeTitle, d.node}, step{"Yours to try", d.wait})
	}
	return append(steps, step{"The resource is deleted", d.remove}, step{"What it took", d.account}, step{accountsTitle, d.attach}, step{ecrTitle, d.ecr}, step{nodeTitle, d.node})
}

const ecrTitle = "Amazon ECR: a token opens a registry, and the next one comes before it expires"

// play runs all steps, cleans up, and returns the exit code. The context ends with a signal.
func (d *demo) play(signalled context.Context) int {
	begin := time.Now()
	ctx, cancel := context.WithCancelCause(signalled)
	defer cancel(nil)
	d.died = cancel

	err := d.playSteps(ctx)
	interrupted := signalled.Err() != nil && !d.waiting
	switch {
	case interrupted:
		d.say("\nInterrupted: cleaning up.")
	case signalled.Err() != nil: // which is what it waited for
	case err != nil:
		if ctx.Err() != nil {
			err = context.Cause(ctx) // a process that ended, which is why the step failed
		}
		d.failed(check{name: fmt.Sprintf("step %d is done", d.step), want: "no error", seen: err.Error()})
	}
	d.cleanUp(interrupted)
	if interrupted {
		return 1
	}
	return d.summarize(time.Since(begin))
}

func (d *demo) playSteps(ctx context.Context) error {
	for i, step := range d.steps() {
		d.step = i + 1
		d.say("\n%d. %s", d.step, step.title)
		if err := step.run(ctx); err != nil {
			return err
		}
	}
	return nil
}

// cleanUp ends everything that runs and removes every file.
func (d *demo) cleanUp(interrupted bool) {
	d.stopProcesses(interrupted)
	d.stopAWS()
	if d.watcher != nil {
		d.watcher.stop()
	}
	if d.control == nil {
		return
	}
	if err := d.control.Stop(); err != nil {
		d.failed(check{name: "everything is stopped and removed", want: "no error", seen: err.Error()})
	}
}

// boot starts the control plane and makes a folder for all that the demo needs besides: in the
// cluster's own, which goes with it, at the latest when the next one starts.
func (d *demo) boot(ctx context.Context) error {
	d.note("etcd, kube-apiserver and kube-controller-manager; the first run builds them (about 10 minutes)")
	begin := time.Now()
	var err error
	if d.control, err = cluster.Run(ctx, cluster.WithProgress(d.out)); err != nil {
		return err
	}
	if d.dir, err = os.MkdirTemp(d.control.Dir(), "demo-"); err != nil {
		return fmt.Errorf("create a folder: %w", err)
	}
	d.client = d.control.Client()
	version, err := d.client.Discovery().ServerVersion()
	if err != nil {
		return fmt.Errorf("ask for the version: %w", err)
	}
	d.note("Kubernetes %s serves on loopback after %.1f s", version.GitVersion, time.Since(begin).Seconds())
	return nil
}

// wait says what there is to try, and waits for Ctrl-C.
func (d *demo) wait(ctx context.Context) error {
	d.say(`   export KUBECONFIG=%s
   kubectl get imps
   kubectl describe imps %s
   kubectl get secrets -A --field-selector metadata.name=%s

   kubectl create namespace mine && kubectl label namespace mine pull=private   # gets the Secret
   kubectl -n search delete secret %[3]s   # comes back
   kubectl -n %[4]s delete secret %[3]s   # the foreign one: then all is Ready

   Where kubectl is missing: apt-get install --no-install-recommends -y kubernetes-client
   or, for the resource only: go run ./test/demo get imps
`, d.control.Kubeconfig(), resourceName, secretName, occupied)
	for _, p := range d.processes {
		d.say("   %-13s http://%s/metrics  %s", p.Name, p.Logged("metricsAddr"), p.LogFile)
	}
	d.say("\n   Ctrl-C ends it and removes everything.")
	d.waiting = true
	<-ctx.Done()
	return context.Cause(ctx)
}

// eventually repeats a look until it finds no fault, or the time is up.
func eventually(ctx context.Context, what string, look func(context.Context) error) error {
	return eventuallyWithin(ctx, within, what, look)
}

func eventuallyWithin(ctx context.Context, within time.Duration, what string, look func(context.Context) error) error {
	ctx, cancel := context.WithTimeoutCause(ctx, within, fmt.Errorf("not within %s", within))
	defer cancel()
	tick := time.NewTicker(pollInterval)
	defer tick.Stop()
	for {
		err := look(ctx)
		if err == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("wait until %s: %w; last seen: %w", what, context.Cause(ctx), err)
		case <-tick.C:
		}
	}
}
