package cluster

import (
	"context"
	"log/slog"

	"github.com/prometheus/client_golang/prometheus"
	"k8s.io/client-go/rest"

	"github.com/imps-node/imps/pkg/api/v1alpha1"
	impsync "github.com/imps-node/imps/pkg/sync"
)

// PlanConfig is what Plan needs.
type PlanConfig struct {
	// Client is the connection to the API server, with the rights of whoever asks.
	Client *rest.Config
	// TargetSecretNames, SourceNamespaces and Excluded are those of the coordinator.
	TargetSecretNames []string
	SourceNamespaces  []string
	Excluded          impsync.Exclusion
	AllowRescue       bool
	// Alongside are ImagePullSecrets that are put into the cluster at the same time.
	Alongside []*v1alpha1.ImagePullSecret
	// ECRSources knows what ECR sources ask for; a plan asks for no token.
	ECRSources ECRSources
}

// PlanResult is what an ImagePullSecret would do in the cluster as it is now. It holds no
// credential.
type PlanResult struct {
	// Name of the ImagePullSecret.
	Name string `json:"name"`
	// Exists: the cluster has one of that name, and this is its new spec.
	Exists bool `json:"exists"`
	// Target is the name of its target Secret.
	Target string `json:"target"`
	// Namespaces are those that its selectors match, sorted.
	Namespaces []PlannedNamespace `json:"namespaces"`
	// Registries are those that the Secret would hold, sorted.
	Registries []PlannedRegistry `json:"registries"`
	// Conflicts keep something from being done as the resource asks for it.
	Conflicts []PlanConflict `json:"conflicts"`
	// Notes are worth knowing, and keep nothing from being done.
	Notes []string `json:"notes"`
	// Unknown is what the caller may not see, and what is not known for that reason.
	Unknown []string `json:"unknown"`
}

// PlannedNamespace is a namespace that the selectors match.
type PlannedNamespace struct {
	Name string `json:"name"`
	// SelectedBy says which kinds of selector match: name, label, annotation, pods.
	SelectedBy []string    `json:"selectedBy"`
	Outcome    PlanOutcome `json:"outcome"`
	// ServiceAccounts is how many of its ServiceAccounts would name the Secret; absent where none is asked for, or they may not
	// be seen.
	ServiceAccounts *int `json:"serviceAccounts,omitempty"`
}

// PlanOutcome is what would become of the target Secret in one namespace.
type PlanOutcome string

// Outcomes.
const (
	// PlanCreate: there is no Secret of the name, and it would be created.
	PlanCreate PlanOutcome = "create"
	// PlanUpdate: it is there, and would be changed in place where it differs.
	PlanUpdate PlanOutcome = "update"
	// PlanAdopt: it is there, was written by IMPS or for another resource, and would be
	// taken over in place.
	PlanAdopt PlanOutcome = "adopt"
	// PlanForeign: a Secret that is not imps's is there, and would be left alone.
	PlanForeign PlanOutcome = "foreign"
	// PlanClaimed: an older ImagePullSecret claims it.
	PlanClaimed PlanOutcome = "claimed"
	// PlanHeld: it is being deleted, and a finalizer holds it.
	PlanHeld PlanOutcome = "held"
	// PlanExcluded: the namespace is in --excluded-namespaces.
	PlanExcluded PlanOutcome = "excluded"
	// PlanTerminating: the namespace is being deleted.
	PlanTerminating PlanOutcome = "terminating"
	// PlanRefused: nothing would be delivered; a conflict that is about the resource as a
	// whole says why.
	PlanRefused PlanOutcome = "refused"
	// PlanUnknown: the caller may not see the Secrets.
	PlanUnknown PlanOutcome = "unknown"
)

// PlannedRegistry is a registry that the Secret would hold credentials for.
type PlannedRegistry struct {
	Registry string `json:"registry"`
	// Source is the one whose credentials it would be.
	Source string `json:"source"`
	// Overrides are sources that have the registry as well, and are listed earlier.
	Overrides []string `json:"overrides,omitempty"`
}

// PlanConflict is a reason why something would not be done as the resource asks for it.
type PlanConflict struct {
	Kind ConflictKind `json:"kind"`
	// Namespace is empty where it is about the resource as a whole.
	Namespace string `json:"namespace,omitempty"`
	Message   string `json:"message"`
}

// ConflictKind is a class of conflicts.
type ConflictKind string

// Kinds of conflicts.
const (
	ConflictSpec    ConflictKind = "InvalidSpec"
	ConflictAllowed ConflictKind = "NotAllowed"
	ConflictSource  ConflictKind = "SourceFailed"
	ConflictForeign ConflictKind = "ForeignSecret"
	ConflictOlder   ConflictKind = "OlderResource"
	ConflictYounger ConflictKind = "YoungerResource"
	ConflictHeld    ConflictKind = "SecretHeld"
)

// Plan tells what an ImagePullSecret would do. It reads with the caller's rights, and
// writes nothing; what it may not read is told in the result and is no error.
func Plan(ctx context.Context, config PlanConfig, r *v1alpha1.ImagePullSecret) (PlanResult, error) {
	// A coordinator that never runs: its clients, and its rules about what is allowed.
	coordinator, err := New(Config{
		Namespace: "none", RenderedNamespace: "none-either", Identity: "none",
		TargetSecretNames: config.TargetSecretNames, SourceNamespaces: config.SourceNamespaces, Excluded: config.Excluded,
		AllowRescue: config.AllowRescue,
		ECRSources:  config.ECRSources,
		Client:      config.Client, Registry: prometheus.NewRegistry(), Log: slog.New(slog.DiscardHandler),
	})
	if err != nil {
		return PlanResult{}, err
	}
	p := &planner{Coordinator: coordinator, resource: r, result: PlanResult{
		Name: r.Name, Target: r.Spec.Target.Secret.Name,
		// Empty lists, not null, in JSON.
		Namespaces: []PlannedNamespace{}, Registries: []PlannedRegistry{}, Conflicts: []PlanConflict{}, Notes: []string{}, Unknown: []string{},
	}}
	p.checkSpec()
	if err := p.planSources(ctx); err != nil {
		return PlanResult{}, err
	}
	if err := p.planNamespaces(ctx, config.Alongside); err != nil {
		return PlanResult{}, err
	}
	return p.result, nil
}
