package cluster

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"sync/atomic"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	corev1client "k8s.io/client-go/kubernetes/typed/core/v1"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/util/workqueue"

	"github.com/imps-node/imps/pkg/api/v1alpha1"
	"github.com/imps-node/imps/pkg/dockerconfig"
	impsync "github.com/imps-node/imps/pkg/sync"
)

// refreshManager is the field manager of a Refresher. It is not that of the duties, so that nobody takes its Secret for
// theirs.
const refreshManager = "imps-node-refresh"

// annotationExpiries is on the target of a Refresher: when its credentials expire, by registry, those that do. A process that
// begins anew knows nothing else of them.
const annotationExpiries = "images.banzaicloud.io/expiries"

// refreshUser is the name under which a Refresher asks for tokens.
const refreshUser = "refresh"

// RefreshConfig is what a Refresher needs.
type RefreshConfig struct {
	// Sources are merged in this order: for one registry the last listed wins.
	Sources []types.NamespacedName
	Target  types.NamespacedName
	// ECRSources and Tokens serve sources with AWS keys. Tokens must call TokenChanged.
	ECRSources ECRSources
	Tokens     Tokens
	Client     *rest.Config
	Metrics    *impsync.Metrics
	Log        *slog.Logger
}

// Refresher keeps one Secret the merge of others, with the rights of their namespaces alone: no resource, no selection, no
// election. It is what banzaicloud/imps's refresher did.
type Refresher struct {
	config  RefreshConfig
	log     *slog.Logger
	core    corev1client.CoreV1Interface
	sources []*source
	target  *impsync.Mirror[refreshed]
	queue   workqueue.TypedRateLimitingInterface[string]
	// current: the target holds what it should.
	current atomic.Bool

	// Only the one worker uses these.
	known state
	told  map[string]string
}

// refreshed is what is kept of the target.
type refreshed struct {
	given
	secretType      corev1.SecretType
	err             error
	uid             types.UID
	resourceVersion string
}

// NewRefresher returns a Refresher that starts with Run.
func NewRefresher(config RefreshConfig) (*Refresher, error) {
	if len(config.Sources) == 0 {
		return nil, errors.New("there is no source")
	}
	core, err := corev1client.NewForConfig(impsync.Protobuf(config.Client))
	if err != nil {
		return nil, fmt.Errorf("client: %w", err)
	}
	r := &Refresher{
		config: config, log: config.Log.With("duty", "refresh"), core: core, told: map[string]string{},
		queue: workqueue.NewTypedRateLimitingQueue(workqueue.NewTypedItemExponentialFailureRateLimiter[string](time.Second, 5*time.Minute)),
	}
	look := func() { r.queue.Add(refreshUser) }
	for _, key := range config.Sources {
		r.sources = append(r.sources, newSource(key, core, config.ECRSources, look, r.log))
	}
	secrets := core.Secrets(config.Target.Namespace)
	r.target = impsync.NewMirror(impsync.MirrorConfig[refreshed]{
		Name: "target " + config.Target.String(), Example: &corev1.Secret{}, Log: r.log,
		ListWatch: impsync.TypedListWatch(secrets.List, secrets.Watch, metav1.ListOptions{FieldSelector: metav1.ObjectNameField + "=" + config.Target.Name}),
		Convert:   func(o runtime.Object) refreshed { return refreshedOf(o.(*corev1.Secret)) },
		OnChange:  func(types.NamespacedName, *refreshed, *refreshed) { look() },
		Version:   func(s refreshed) string { return s.resourceVersion },
	})
	return r, nil
}

func refreshedOf(s *corev1.Secret) refreshed {
	r := refreshed{secretType: s.Type, uid: s.UID, resourceVersion: s.ResourceVersion}
	r.config, _, r.err = dockerconfig.Parse(string(s.Type), s.Data)
	if err := json.Unmarshal([]byte(s.Annotations[annotationExpiries]), &r.expiries); err != nil {
		r.expiries = nil // somebody else's, or what an earlier version has written
	}
	return r
}

// Ready returns nil where the target holds what it should.
func (r *Refresher) Ready() error {
	if !r.current.Load() {
		return fmt.Errorf("the Secret %s does not hold what its sources give", r.config.Target)
	}
	return nil
}

// TokenChanged is to be called where the status of a grant has changed.
func (r *Refresher) TokenChanged(string) { r.queue.Add(refreshUser) }

// Run keeps the target until ctx ends.
func (r *Refresher) Run(ctx context.Context) error {
	work, finish := impsync.WithGrace(ctx)
	defer finish()
	defer r.config.Tokens.Use(refreshUser, nil)
	tasks := []func(context.Context) error{
		func(ctx context.Context) error { r.target.Run(ctx); return nil },
		func(ctx context.Context) error {
			select {
			case <-r.target.Synced():
				r.queue.Add(refreshUser)
			case <-ctx.Done():
			}
			return nil
		},
		func(ctx context.Context) error { <-ctx.Done(); r.queue.ShutDown(); return nil },
		func(context.Context) error { r.serve(work); return nil },
	}
	for _, s := range r.sources {
		tasks = append(tasks, func(ctx context.Context) error { s.run(ctx); return nil })
	}
	return impsync.RunTasks(ctx, tasks...)
}

// serve looks at the target whenever there is reason to.
func (r *Refresher) serve(work context.Context) {
	for {
		item, shutdown := r.queue.Get()
		if shutdown {
			return
		}
		err := r.refresh(work)
		r.current.Store(err == nil)
		switch {
		case err == nil:
			r.queue.Forget(item)
		case errors.Is(err, errIncomplete): // a watch, or whoever mints tokens, brings it back
			r.queue.Forget(item)
		default:
			r.log.Warn("cannot refresh the Secret, will try again", "secret", r.config.Target.String(), "error", impsync.Explain(err))
			r.queue.AddRateLimited(item)
		}
		r.queue.Done(item)
	}
}

// errIncomplete: sources fail, or have not been read yet.
var errIncomplete = errors.New("sources fail or have not been read yet")

// refresh writes the target where it does not hold what its sources give.
func (r *Refresher) refresh(work context.Context) error {
	select {
	case <-r.target.Synced():
	default:
		return errIncomplete
	}
	credentials := make([]credential, len(r.config.Sources))
	for i, key := range r.config.Sources {
		credentials[i].key = key.Namespace + "." + key.Name
		r.sources[i].read(key, &credentials[i])
	}
	r.config.Tokens.Use(refreshUser, wantedBy(credentials, nil))
	readTokens(r.config.Tokens, credentials)
	now := r.config.Tokens.Now()
	resolved := resolve(credentials, &r.known, now)
	if resolved.pending {
		return errIncomplete
	}
	r.tell(resolved.sources)
	r.known.lastGood = resolved.lastGood
	lookAgain(r.queue, refreshUser, resolved.until, now)
	there, exists := r.target.Get(r.config.Target)
	if resolved.empty && !exists {
		return errIncomplete // there is nothing to write
	}
	if exists && there.secretType != corev1.SecretTypeDockerConfigJson {
		return fmt.Errorf("it is there with the type %s, and has to be of type %s: delete it, or name another one", there.secretType, corev1.SecretTypeDockerConfigJson)
	}
	wanted := resolved.given
	if resolved.incomplete && exists && there.err == nil {
		// What the source that fails gave before this process began stands there, among the others.
		before := there.unexpired(now)
		lookAgain(r.queue, refreshUser, before.end(), now)
		wanted = merge(before, wanted)
	}
	if !exists || there.err != nil || !there.equal(wanted) {
		if err := r.write(work, wanted, there, exists); err != nil {
			return err
		}
	}
	if len(failedSources(resolved.sources)) > 0 {
		return errIncomplete
	}
	return nil
}

// write applies the target over what was there, so that nothing is lost that has come since.
func (r *Refresher) write(work context.Context, credentials given, there refreshed, exists bool) error {
	rendered, err := credentials.config.Render()
	if err != nil {
		return fmt.Errorf("the merged credentials: %w", err)
	}
	annotations := map[string]string{}
	if len(credentials.expiries) > 0 {
		expiries, err := json.Marshal(credentials.expiries)
		if err != nil {
			return fmt.Errorf("when the credentials expire: %w", err)
		}
		annotations[annotationExpiries] = string(expiries)
	}
	secret := &corev1.Secret{
		TypeMeta:   metav1.TypeMeta{APIVersion: "v1", Kind: "Secret"},
		ObjectMeta: metav1.ObjectMeta{Name: r.config.Target.Name, ResourceVersion: impsync.Absent, Annotations: annotations},
		Type:       corev1.SecretTypeDockerConfigJson,
		Data:       map[string][]byte{corev1.DockerConfigJsonKey: []byte(rendered.Reveal())},
	}
	verb := "create"
	if exists {
		secret.UID, secret.ResourceVersion, verb = there.uid, there.resourceVersion, "update"
	}
	ctx, cancel := context.WithTimeout(work, impsync.CallTimeout)
	defer cancel()
	written, err := applySecret(ctx, r.core.Secrets(r.config.Target.Namespace), secret, refreshManager)
	r.config.Metrics.SecretWrite(refreshUser, verb, err)
	if apierrors.IsConflict(err) {
		return errIncomplete // the watch brings what is there by now
	}
	if err != nil {
		return fmt.Errorf("write it: %w", err)
	}
	r.target.Put(r.config.Target, refreshedOf(written))
	r.log.Info("wrote the Secret", "secret", r.config.Target.String(), "registries", len(credentials.config.Entries()))
	return nil
}

// tell logs what has changed about the sources.
func (r *Refresher) tell(sources map[string]string) {
	for key, status := range sources {
		switch {
		case r.told[key] == status:
		case status != v1alpha1.SourceOK:
			r.log.Warn("a source cannot be used", "source", key, "error", status)
		case r.told[key] != "":
			r.log.Info("a source can be used again", "source", key)
		}
	}
	r.told = maps.Clone(sources)
}
