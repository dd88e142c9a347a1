package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/metadata"
	"k8s.io/client-go/rest"

	impsync "github.com/imps-node/imps/pkg/sync"
	"github.com/imps-node/imps/test/cluster/cluster"
	"github.com/imps-node/imps/test/imps"
)

// size is how much there is in the cluster.
type size struct {
	name string
	// pods and labels are how many namespaces are selected by their Pods and by their label.
	pods, labels int
	// labelled: the labels are there before the resource.
	labelled bool
	// unrelated are Secrets of 32 KiB that nobody asks for.
	unrelated int
	// accounts are how many ServiceAccounts of each namespace name the Secret.
	accounts int
	// images are how many a node pulls in each series.
	images int
}

var sizes = []size{
	{name: "small", pods: 200, labels: 200},
	{name: "large", pods: 500, labels: 500, unrelated: 3000},
	{name: "huge", labels: 10000, labelled: true},
	{name: "accounts", labels: 10000, labelled: true, accounts: 3},
	{name: sizeProvider},
	{name: sizeKubelet, images: pulls},
}

func sizeNames() (names []string) {
	for _, s := range sizes {
		names = append(names, s.name)
	}
	return names
}

func sizeNamed(name string) (size, error) {
	for _, s := range sizes {
		if s.name == name {
			return s, nil
		}
	}
	return size{}, fmt.Errorf("--sizes: there is no %q, only %s", name, strings.Join(sizeNames(), ", "))
}

// quiet is how long imps has to write nothing but its Lease before a phase is over: it
// writes reports once a second at most, and a status every 1.5 s. That lies in none of the times.
const quiet = 1700 * time.Millisecond

// The phases.
const (
	phasePods     = "pods"
	phaseLabels   = "labels"
	phaseDelivery = "delivery"
	phaseAccounts = "accounts"
	phaseRotation = "rotation"
	phaseIdle     = "idle"
	phaseDeletion = "deletion"
)

// accountSamples is how many ServiceAccounts are created in the phase accounts.
const accountSamples = 200

// measure runs every size as often as asked for. What was measured before an error it
// returns beside it.
func measure(ctx context.Context, s settings, progress io.Writer) (*result, error) {
	r := &result{Rate: s.rate, Idle: s.idle.Seconds()}
	root, err := repository(ctx)
	if err != nil {
		return r, err
	}
	if s.profile != "" {
		if s.profile, err = filepath.Abs(s.profile); err == nil {
			err = os.MkdirAll(s.profile, 0o750)
		}
		if err != nil {
			return r, fmt.Errorf("create --profile: %w", err)
		}
	}
	r.Machine = thisMachine(ctx, root)
	for repeat := range s.repeats {
		for _, name := range s.sizes {
			size, err := sizeNamed(name)
			if err != nil {
				return r, err
			}
			if s.namespaces > 0 {
				size.pods, size.labels = min(size.pods, s.namespaces), s.namespaces
			}
			b := &bench{settings: s, size: size, root: root, progress: progress, begin: time.Now()}
			b.say("run %d of %d", repeat+1, s.repeats)
			measure := b.measure
			switch name {
			case sizeProvider:
				measure = b.measureProvider
			case sizeKubelet:
				if err := cluster.CanStartNode(); err != nil {
					b.say("left out: %v", err)
					continue
				}
				measure = b.measureKubelet
			}
			if err := measure(ctx); err != nil {
				return r, fmt.Errorf("%s: %w", name, err)
			}
			r.Machine.Kubernetes = cmp.Or(b.kubernetes, r.Machine.Kubernetes)
			r.Runs = append(r.Runs, b.run)
		}
	}
	return r, nil
}

// bench is one run of one size.
type bench struct {
	settings settings
	size     size
	root     string
	progress io.Writer
	begin    time.Time
	run      sizeRun

	control    *cluster.Cluster
	kubernetes string // its version
	client     kubernetes.Interface
	metadata   metadata.Interface
	watcher    *watcher
	accounts   *watcher
	dir        string // in the cluster's own, with which it goes
	binary     string
	processes  []*imps.Process
	password   string
}

func (b *bench) say(format string, args ...any) {
	// Whoever reads no more must not keep the bench from cleaning up.
	_, _ = fmt.Fprintf(b.progress, "bench: %s, %5.1f s: %s\n", b.size.name, time.Since(b.begin).Seconds(), fmt.Sprintf(format, args...))
}

func (b *bench) measure(ctx context.Context) (err error) {
	b.run = sizeRun{Size: b.size.name, Pods: b.size.pods, Labels: b.size.labels, Load: load()}
	b.control, err = cluster.Run(ctx, cluster.WithProgress(b.progress))
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, b.control.Stop()) }()
	if err := b.install(ctx); err != nil {
		return err
	}
	b.say("making %d namespaces and %d Secrets that are not imps's", b.size.pods+b.size.labels, b.size.unrelated)
	if err := b.prepare(ctx); err != nil {
		return err
	}
	if b.watcher, err = newWatcher(ctx, b.metadata.Resource(impsync.SecretResource), isPullSecret); err != nil {
		return err
	}
	defer b.watcher.stop()
	if b.accounts, err = newWatcher(ctx, b.metadata.Resource(impsync.ServiceAccountResource), isLateAndAttached); err != nil {
		return err
	}
	defer b.accounts.stop()
	// From here on with what it may do by default: the garbage collector is at work beside
	// imps. To make namespaces it may do more.
	if err := b.control.RestartControllerManager(ctx, "--kube-api-qps=20", "--kube-api-burst=30"); err != nil {
		return err
	}
	b.say("measuring plain clients")
	if b.run.Floor, err = b.measureFloor(ctx); err != nil {
		return fmt.Errorf("floor: %w", err)
	}

	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	defer func() {
		if ctx.Err() != nil {
			err = context.Cause(ctx) // a process that ended, which is why something failed
		}
		err = errors.Join(err, b.terminate())
	}()
	b.say("starting a coordinator and two agents")
	if err := b.start(ctx, cancel); err != nil {
		return err
	}
	return b.phases(ctx)
}

// install builds and installs imps, and makes the bench's own clients, each with a
// connection of its own.
func (b *bench) install(ctx context.Context) (err error) {
	if b.dir, err = os.MkdirTemp(b.control.Dir(), "bench-"); err != nil {
		return fmt.Errorf("create a folder: %w", err)
	}
	if b.binary, err = build(ctx, b.root, b.dir, b.settings.profile != ""); err != nil {
		return err
	}
	if err := imps.Install(ctx, b.root, b.control); err != nil {
		return err
	}
	if b.client, err = kubernetes.NewForConfig(b.connection()); err != nil {
		return err
	}
	if b.metadata, err = metadata.NewForConfig(b.connection()); err != nil {
		return err
	}
	version, err := b.client.Discovery().ServerVersion()
	if err != nil {
		return fmt.Errorf("ask for the version: %w", err)
	}
	b.kubernetes = version.GitVersion
	return nil
}

// connection returns a config of the admin that shares its connection with no other:
// client-go shares those with the same dialer.
func (b *bench) connection() *rest.Config {
	config := b.control.Admin()
	config.Dial = (&net.Dialer{Timeout: 10 * time.Second}).DialContext
	return config
}

// start starts imps, and waits until it is ready. A process that ends too early ends the run.
func (b *bench) start(ctx context.Context, cancel context.CancelCauseFunc) error {
	coordinator, err := imps.Coordinator(ctx, b.control)
	if err != nil {
		return err
	}
	specs := []imps.Spec{coordinator}
	for _, node := range nodes {
		agent, err := imps.Agent(ctx, b.control, node)
		if err != nil {
			return err
		}
		specs = append(specs, agent)
	}
	for _, spec := range specs {
		if b.settings.profile != "" {
			spec.Env = append(spec.Env, "BENCH_PROFILE="+b.profilePath(&imps.Process{Name: spec.Name}))
		}
		p, err := imps.Start(context.WithoutCancel(ctx), b.control, b.binary, b.dir, spec)
		if err != nil {
			return err
		}
		b.processes = append(b.processes, p)
		go func() {
			select {
			case <-p.Ended():
				cancel(fmt.Errorf("%s has ended; its log:\n%s", p.Name, p.Log()))
			case <-ctx.Done():
			}
		}()
	}
	for _, p := range b.processes {
		if err := p.AwaitReady(ctx); err != nil {
			return err
		}
	}
	return nil
}

func (b *bench) terminate() error {
	var errs []error
	for _, p := range b.processes {
		errs = append(errs, p.Terminate())
	}
	return errors.Join(errs...)
}

// phases are what imps is measured by, in this order.
func (b *bench) phases(ctx context.Context) error {
	byPods, byLabel := b.podNamespaces(), b.labelNamespaces()
	all := append(append([]string{}, byPods...), byLabel...)
	interval := time.Duration(float64(time.Second) / b.settings.rate)

	if err := b.writeSource(ctx); err != nil {
		return err
	}
	if b.size.labelled {
		if err := b.phase(ctx, b.watcher, phaseDelivery, watch.Added, all, one(all, b.createResource)); err != nil {
			return err
		}
		if some := all[:min(len(all), accountSamples)]; b.size.accounts > 0 {
			if err := b.phase(ctx, b.accounts, phaseAccounts, watch.Modified, some, paced(some, interval, b.createAccount)); err != nil {
				return err
			}
		}
	} else {
		if err := b.createResource(ctx); err != nil {
			return err
		}
		// Otherwise the first times would tell how long it takes to be elected.
		if err := await(ctx, b.isReady); err != nil {
			return err
		}
		if err := b.settle(ctx); err != nil {
			return err
		}
		if err := b.phase(ctx, b.watcher, phasePods, watch.Added, byPods, paced(byPods, interval, b.createPod)); err != nil {
			return err
		}
		if err := b.phase(ctx, b.watcher, phaseLabels, watch.Added, byLabel, paced(byLabel, interval, b.label)); err != nil {
			return err
		}
	}
	if err := b.checkContent(ctx, all); err != nil {
		return err
	}
	if err := b.phase(ctx, b.watcher, phaseRotation, watch.Modified, all, one(all, b.writeSource)); err != nil {
		return err
	}
	if err := b.checkContent(ctx, all); err != nil {
		return err
	}
	if err := b.phase(ctx, b.watcher, phaseIdle, "", nil, func(ctx context.Context) (map[string]call, error) {
		return nil, pause(ctx, b.settings.idle)
	}); err != nil {
		return err
	}
	idle, err := usages()
	if err != nil {
		return err
	}
	if err := b.phase(ctx, b.watcher, phaseDeletion, watch.Deleted, all, one(all, b.deleteResource)); err != nil {
		return err
	}
	end, err := usages()
	if err != nil {
		return err
	}
	b.run.Cuts = b.watcher.cut() + b.accounts.cut()
	b.run.Memory = map[string]memory{}
	for name, u := range end {
		b.run.Memory[name] = memory{Idle: idle[name].ResidentMiB, End: u.ResidentMiB, Peak: u.PeakMiB}
	}
	return nil
}

// trigger pulls the triggers of a phase.
type trigger func(context.Context) (map[string]call, error)

// paced is one trigger for each namespace, at the rate of the settings.
func paced(namespaces []string, interval time.Duration, f func(context.Context, string) error) trigger {
	return func(ctx context.Context) (map[string]call, error) { return callAll(ctx, namespaces, 0, interval, f) }
}

// one is one trigger for all namespaces.
func one(namespaces []string, f func(context.Context) error) trigger {
	return func(ctx context.Context) (map[string]call, error) {
		sent := time.Now()
		err := f(ctx)
		answered := call{sent, time.Now()}
		calls := map[string]call{}
		for _, namespace := range namespaces {
			calls[namespace] = answered
		}
		return calls, err
	}
}

// phase pulls the triggers and waits until every namespace has seen its event; what else
// comes of it is counted until it must have settled.
func (b *bench) phase(ctx context.Context, w *watcher, name string, kind watch.EventType, namespaces []string, pull trigger) error {
	b.say("%s", name)
	mark := b.control.Audit().Mark()
	seen := w.expect(kind, namespaces)
	p := phase{Name: name}
	var err error
	if p.CPU, err = used(func() error {
		return b.profiled(ctx, name, func() error {
			calls, err := pull(ctx)
			if err != nil {
				return err
			}
			if err := seen.wait(ctx); err != nil {
				return err
			}
			p.Latency = latencyOf(seen.since(func(namespace string) time.Time { return calls[namespace].replied }))
			return b.settle(ctx)
		})
	}); err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	p.Extra = seen.extras()
	if p.Account, err = accountSince(b.control, mark); err != nil {
		return err
	}
	b.run.Phases = append(b.run.Phases, p)
	return nil
}

// settle waits until imps is quiet.
func (b *bench) settle(ctx context.Context) error {
	return await(ctx, func(ctx context.Context) error {
		mark := b.control.Audit().Mark()
		if err := pause(ctx, quiet); err != nil {
			return err
		}
		a, err := accountSince(b.control, mark)
		if n := a.impsWrites(); err == nil && n > 0 {
			err = fmt.Errorf("imps has made %d writes in %s", n, quiet)
		}
		return err
	})
}

// checkContent makes sure that every Secret holds the current credentials. It is not timed.
func (b *bench) checkContent(ctx context.Context, namespaces []string) error {
	list, err := b.client.CoreV1().Secrets("").List(ctx, metav1.ListOptions{FieldSelector: "metadata.name=" + imps.SecretName})
	if err != nil {
		return fmt.Errorf("read all pull Secrets: %w", err)
	}
	current := 0
	for i := range list.Items {
		var config struct {
			Auths map[string]struct{ Password string } `json:"auths"`
		}
		if json.Unmarshal(list.Items[i].Data[corev1.DockerConfigJsonKey], &config) == nil && config.Auths[registry].Password == b.password {
			current++
		}
	}
	if current != len(namespaces) || len(list.Items) != current {
		return fmt.Errorf("%d of %d pull Secrets hold the current credentials, for %d namespaces", current, len(list.Items), len(namespaces))
	}
	return nil
}
