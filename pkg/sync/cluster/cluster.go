// Package cluster is the cluster duty: the one elected coordinator resolves the
// credentials of every ImagePullSecret, merges and renders them, and delivers, repairs,
// hands over and prunes the target Secrets of all namespaces. It alone writes status.
//
// It never touches a Secret that is not imps's own.
package cluster

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"github.com/go-logr/logr"
	"github.com/prometheus/client_golang/prometheus"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	coordinationv1client "k8s.io/client-go/kubernetes/typed/coordination/v1"
	corev1client "k8s.io/client-go/kubernetes/typed/core/v1"
	policyv1client "k8s.io/client-go/kubernetes/typed/policy/v1"
	"k8s.io/client-go/metadata"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/leaderelection"
	"k8s.io/client-go/tools/leaderelection/resourcelock"
	"k8s.io/client-go/tools/record"
	"k8s.io/klog/v2"

	"github.com/imps-node/imps/pkg/api/v1alpha1"
	impsync "github.com/imps-node/imps/pkg/sync"
)

const (
	// duty is this package's name in metrics and logs.
	duty = "cluster"

	// LeaseName is the Lease that the coordinators compete for. It is banzaicloud/imps's,
	// so that the two never write at the same time where they share a namespace.
	LeaseName = "73de1ad9.banzaicloud.io"

	// writesInFlight bounds all writes that are under way; writers and accountWriters, how many target Secrets and namespaces
	// with ServiceAccounts are looked at.
	writesInFlight          = 32
	writers, accountWriters = writesInFlight, 8

	// DefaultDemandLinger is how long a namespace keeps its Secret after the last Pod
	// that selected it is gone.
	DefaultDemandLinger = time.Minute
	// DefaultReportLinger is how long a node report outlives its Node.
	DefaultReportLinger = 10 * time.Minute

	// demandDelay is how long new demand waits: the node that reports it is creating the
	// Secret just then, and a second write would be for nothing.
	demandDelay = 250 * time.Millisecond

	// Lease times: a dead leader is replaced after at most leaseDuration + retryPeriod.
	leaseDuration = 15 * time.Second
	renewDeadline = 10 * time.Second
	retryPeriod   = 3 * time.Second

	// giveUpInterval is for how long a coordinator leads without AWS credentials once it has given the Lease up for want
	// of them: nobody else may have any.
	giveUpInterval = time.Hour
)

// Any allows every name, as the only element of a list of names.
const Any = "*"

// errSuperseded ends a term in which another leader was seen at work.
var errSuperseded = errors.New("another coordinator leads")

// Config is what a Coordinator needs.
type Config struct {
	// Namespace holds the Lease, the state Secrets and the node reports.
	Namespace         string
	RenderedNamespace string
	// TargetSecretNames are the names that a target Secret may have, SourceNamespaces the
	// namespaces that a source may be in; Any alone allows all.
	TargetSecretNames []string
	SourceNamespaces  []string
	// Excluded namespaces are never selected.
	Excluded impsync.Exclusion
	// AllowRescue: resources may have Pods evicted that are stuck.
	AllowRescue bool
	// FormatVersions are the versions of the rendered form that it reads and writes, in
	// ascending order; impsync.FormatVersions where it is nil.
	FormatVersions []int
	// Identity is this process's own name in the Lease; it must be unique.
	Identity string
	// DemandLinger is DefaultDemandLinger where it is zero.
	DemandLinger time.Duration
	// ReportLinger is DefaultReportLinger where it is zero.
	ReportLinger time.Duration
	// Client is the connection to the API server, with the coordinator's own identity.
	Client *rest.Config
	// ECRSources and Tokens serve ECR sources; without them these are not supported.
	ECRSources ECRSources
	Tokens     Tokens
	Metrics    *impsync.Metrics
	Registry   prometheus.Registerer
	Log        *slog.Logger
}

// Coordinator is the cluster duty.
type Coordinator struct {
	config   Config
	log      *slog.Logger
	core     corev1client.CoreV1Interface
	events   corev1client.EventsGetter
	leases   coordinationv1client.CoordinationV1Interface
	budgets  policyv1client.PodDisruptionBudgetsGetter
	metadata metadata.Interface
	secrets  *impsync.Secrets
	images   rest.Interface
	metrics  *metrics
	guard    leaseGuard
	// standby: another leads. synced: it leads and has read everything.
	standby atomic.Bool
	// gaveUp is when it last gave the Lease up for want of AWS credentials.
	gaveUp atomic.Pointer[time.Time]
	// leads is the term that it leads, nil where it does not.
	leads  atomic.Pointer[term]
	synced atomic.Bool
}

// New returns a Coordinator that starts with Run.
func New(config Config) (*Coordinator, error) {
	switch {
	case config.Namespace == "" || config.RenderedNamespace == "":
		return nil, errors.New("the cluster duty needs the namespaces of its Lease and of the rendered Secrets")
	case config.Namespace == config.RenderedNamespace:
		return nil, errors.New("the rendered Secrets need a namespace of their own: every agent may read all that is in it")
	case config.Identity == "":
		return nil, errors.New("the cluster duty needs an identity of its own in the Lease")
	case len(config.TargetSecretNames) == 0:
		return nil, errors.New("no target Secret name is allowed: set --target-secret-names")
	}
	if config.FormatVersions == nil {
		config.FormatVersions = impsync.FormatVersions()
	}
	if config.DemandLinger == 0 {
		config.DemandLinger = DefaultDemandLinger
	}
	if config.ReportLinger == 0 {
		config.ReportLinger = DefaultReportLinger
	}
	c := &Coordinator{config: config, log: config.Log.With("duty", duty)}
	transport, err := rest.TransportFor(config.Client)
	if err != nil {
		return nil, fmt.Errorf("connection to the API server: %w", err)
	}
	// All that needs the Lease goes through the guard.
	unguarded := &http.Client{Transport: transport, Timeout: config.Client.Timeout}
	connection := &http.Client{Transport: c.guard.wrap(transport), Timeout: config.Client.Timeout}
	binary := impsync.Protobuf(config.Client)
	if c.core, err = corev1client.NewForConfigAndClient(binary, connection); err != nil {
		return nil, fmt.Errorf("client: %w", err)
	}
	if c.budgets, err = policyv1client.NewForConfigAndClient(binary, connection); err != nil {
		return nil, fmt.Errorf("client: %w", err)
	}
	core, err := corev1client.NewForConfigAndClient(binary, unguarded)
	if err != nil {
		return nil, fmt.Errorf("client: %w", err)
	}
	c.events = core
	if c.leases, err = coordinationv1client.NewForConfigAndClient(binary, unguarded); err != nil {
		return nil, fmt.Errorf("client: %w", err)
	}
	if c.metadata, err = metadata.NewForConfigAndClient(config.Client, connection); err != nil {
		return nil, fmt.Errorf("metadata client: %w", err)
	}
	if c.secrets, err = impsync.NewSecrets(config.Client, connection); err != nil {
		return nil, err
	}
	if c.images, err = impsync.ImagesClient(config.Client, connection); err != nil {
		return nil, err
	}
	if c.metrics, err = newMetrics(config.Registry); err != nil {
		return nil, err
	}
	return c, nil
}

// Ready returns nil where the coordinator has seen another lead, or leads and has read
// everything that it decides from.
func (c *Coordinator) Ready() error {
	if c.standby.Load() || c.synced.Load() {
		return nil
	}
	return errors.New("the cluster duty has not read the cluster yet")
}

// Leading reports whether this process leads and has read everything.
func (c *Coordinator) Leading() bool { return c.synced.Load() }

// Run competes for the Lease and leads whenever it holds it, until ctx ends; then it
// finishes what is in flight and gives the Lease up. It returns an error only where going
// on makes no sense. A Coordinator runs once.
func (c *Coordinator) Run(ctx context.Context) error {
	events := record.NewBroadcaster(record.WithContext(klog.NewContext(context.WithoutCancel(ctx), logr.Discard())))
	defer events.Shutdown()
	events.StartRecordingToSink(&corev1client.EventSinkImpl{Interface: c.events.Events("")})
	scheme := runtime.NewScheme()
	if err := errors.Join(v1alpha1.AddToScheme(scheme), corev1.AddToScheme(scheme)); err != nil {
		return err
	}
	recorder := events.NewRecorder(scheme, corev1.EventSource{Component: impsync.FieldManager})
	for ctx.Err() == nil {
		err := c.compete(ctx, recorder)
		switch {
		case errors.Is(err, ErrNoCredentials):
			c.standby.Store(true)
			c.log.Warn("gave the Lease up, so that a coordinator leads that has AWS credentials, if there is one")
			impsync.Pause(ctx, 2*leaseDuration)
		case err != nil && !errors.Is(err, errSuperseded):
			return err
		}
	}
	return nil
}

// compete waits for the Lease and leads one term.
func (c *Coordinator) compete(ctx context.Context, recorder record.EventRecorder) error {
	// The Lease is given up when the election's context ends. That outlives ctx until the
	// term has finished what is in flight: who leads next must not meet our writes.
	election, giveUp := context.WithCancel(klog.NewContext(context.WithoutCancel(ctx), logr.Discard()))
	defer giveUp()
	acquired := &acquisition{}
	defer context.AfterFunc(ctx, func() {
		if !acquired.Load() {
			giveUp()
		}
	})()

	var termErr error
	ended := make(chan struct{})
	elector, err := leaderelection.NewLeaderElector(leaderelection.LeaderElectionConfig{
		Lock: &guardedLock{guard: &c.guard, Interface: &resourcelock.LeaseLock{
			LeaseMeta:  metav1.ObjectMeta{Namespace: c.config.Namespace, Name: LeaseName},
			Client:     c.leases,
			LockConfig: resourcelock.ResourceLockConfig{Identity: c.config.Identity, EventRecorder: acquired},
		}},
		LeaseDuration: leaseDuration, RenewDeadline: renewDeadline, RetryPeriod: retryPeriod,
		Name: LeaseName,
		Callbacks: leaderelection.LeaderCallbacks{
			OnStartedLeading: func(held context.Context) {
				defer close(ended)
				defer giveUp()
				c.standby.Store(false)
				term, stop := context.WithCancel(held)
				defer stop()
				defer context.AfterFunc(ctx, stop)()
				c.metrics.leader.Set(1)
				defer c.metrics.leader.Set(0)
				c.log.Info("leading", "identity", c.config.Identity)
				termErr = newTerm(c, recorder).run(term)
				c.synced.Store(false)
				c.log.Info("no longer leading", "identity", c.config.Identity, "cause", cause(ctx, held, termErr))
			},
			OnStoppedLeading: func() {},
			OnNewLeader: func(identity string) {
				if identity != c.config.Identity {
					c.standby.Store(true)
				}
			},
		},
	})
	if err != nil {
		return fmt.Errorf("leader election: %w", err)
	}
	elector.Run(election)
	if acquired.Load() {
		<-ended
		if !errors.Is(termErr, errSuperseded) {
			c.release(ctx)
		}
	}
	return termErr
}

// release gives the Lease up, so that another coordinator need not wait until it expires.
// The elector's own release goes by what it has observed last, and would take the Lease
// from another leader that it has not seen yet; this one looks first.
func (c *Coordinator) release(ctx context.Context) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), impsync.Grace)
	defer cancel()
	leases := c.leases.Leases(c.config.Namespace)
	lease, err := leases.Get(ctx, LeaseName, metav1.GetOptions{})
	if err == nil && lease.Spec.HolderIdentity != nil && *lease.Spec.HolderIdentity == c.config.Identity {
		nobody, second, now := "", int32(1), metav1.NowMicro()
		lease.Spec.HolderIdentity, lease.Spec.LeaseDurationSeconds, lease.Spec.RenewTime = &nobody, &second, &now
		_, err = leases.Update(ctx, lease, metav1.UpdateOptions{FieldManager: impsync.FieldManager})
	}
	if err != nil {
		c.log.Warn("cannot give the Lease up, it will expire", "error", impsync.Explain(err))
	}
}

// acquisition is true once the Lease was acquired. The elector starts the term in a
// goroutine and does not wait for it; what it tells its event recorder ("became leader")
// comes before that, in the elector's own goroutine.
type acquisition struct{ atomic.Bool }

func (a *acquisition) Eventf(runtime.Object, string, string, string, ...any) { a.Store(true) }

func cause(ctx, held context.Context, err error) string {
	switch {
	case err != nil:
		return err.Error()
	case ctx.Err() != nil:
		return "stopping"
	case held.Err() != nil:
		return "the Lease could not be renewed"
	default:
		return "done"
	}
}

// holdsLease asks the API server whether this process still leads.
func (c *Coordinator) holdsLease(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, impsync.CallTimeout)
	defer cancel()
	lease, err := c.leases.Leases(c.config.Namespace).Get(ctx, LeaseName, metav1.GetOptions{})
	if err != nil {
		return passing("read the Lease", err)
	}
	if lease.Spec.HolderIdentity == nil || *lease.Spec.HolderIdentity != c.config.Identity {
		return errSuperseded
	}
	return nil
}

// targetNameAllowed returns what is wrong with the name of a target Secret.
func (c *Coordinator) targetNameAllowed(name string) error {
	if allowed(c.config.TargetSecretNames, name) {
		return nil
	}
	return fmt.Errorf("spec.target.secret.name %q is not in --target-secret-names (%s): add it to the chart's value targetSecretNames",
		name, strings.Join(c.config.TargetSecretNames, ", "))
}

// sourceNamespaceAllowed returns what is wrong with the namespace of a source.
func (c *Coordinator) sourceNamespaceAllowed(namespace string) error {
	if allowed(c.config.SourceNamespaces, namespace) {
		return nil
	}
	return fmt.Errorf("namespace %q is not in --source-namespaces (%s): add it to the chart's value sourceNamespaces",
		namespace, strings.Join(c.config.SourceNamespaces, ", "))
}

func allowed(list []string, name string) bool {
	return slices.Contains(list, name) || len(list) == 1 && list[0] == Any
}
